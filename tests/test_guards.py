"""The guards that run around every test catch what they are there to catch."""

import asyncio
import io
import os
import pickle
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from blockbuster import BlockingError

from leaks import Census, census, leaks_since, pending_tasks_since
from loop_guard import ENGINE_THREAD, package_dir


def inside_aiockpt(call: Callable[[], object], file: str = "probe.py") -> None:
    """Makes `call` below a frame that looks like one of aiockpt's."""
    code = compile("call()", str(package_dir() / file), "exec")
    exec(code, {"call": call})  # noqa: S102 - the frame's file name is the point


def on_thread(name: str, work: Callable[[], object]) -> None:
    """Runs `work` on the loop of a new thread; raises what it raised."""
    outcome: list[BaseException] = []

    async def main() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            outcome.append(error)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name=name)
    thread.start()
    thread.join()
    if outcome:
        raise outcome[0]


# Each name is looked up when it is called, hence `lambda` throughout.
FILE_CALLS = {
    "sleep": lambda path: time.sleep(0),
    "open": lambda path: path.open().close(),
    "os.open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "stat": lambda path: path.stat(),
    "listdir": lambda path: list(path.parent.iterdir()),
    "scandir": lambda path: os.scandir(path.parent).close(),
    "mkdir": lambda path: path.with_name("new").mkdir(),
    "replace": lambda path: path.replace(path.with_name("new")),
    "unlink": lambda path: path.unlink(),
    "statvfs": lambda path: os.statvfs(path),  # noqa: PLW0108
    "truncate": lambda path: os.truncate(path, 0),
    "crc32": lambda path: zlib.crc32(bytes(1 << 20)),
    "future": lambda path: threading.Event().wait(0.001),
}
DESCRIPTOR_CALLS = {
    "fsync": lambda fd: os.fsync(fd),  # noqa: PLW0108
    "fdatasync": lambda fd: os.fdatasync(fd),  # noqa: PLW0108
    "pread": lambda fd: os.pread(fd, 1, 0),
    "preadv": lambda fd: os.preadv(fd, [bytearray(1)], 0),
    "pwrite": lambda fd: os.pwrite(fd, b"x", 0),
    "pwritev": lambda fd: os.pwritev(fd, [b"x"], 0),
    "ftruncate": lambda fd: os.ftruncate(fd, 0),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize("call", FILE_CALLS.values(), ids=FILE_CALLS)
async def test_a_blocking_call_of_aiockpt_on_a_loop_raises(call, file, blocking_calls):
    with pytest.raises(BlockingError):
        inside_aiockpt(lambda: call(file))
    assert len(blocking_calls) == 1
    assert "probe.py" in blocking_calls[0]
    blocking_calls.clear()


@pytest.mark.parametrize("call", DESCRIPTOR_CALLS.values(), ids=DESCRIPTOR_CALLS)
async def test_a_blocking_call_on_a_descriptor_raises(call, file, blocking_calls):
    with file.open("r+b") as opened:
        with pytest.raises(BlockingError):
            inside_aiockpt(lambda: call(opened.fileno()))
    blocking_calls.clear()


def test_the_engines_own_loop_is_watched_too(file, blocking_calls):
    with pytest.raises(BlockingError):
        on_thread(ENGINE_THREAD, lambda: inside_aiockpt(file.read_bytes))
    blocking_calls.clear()


def test_a_thread_without_a_loop_may_block(file):
    inside_aiockpt(file.read_bytes)


async def test_a_test_may_block_its_own_loop(file):
    assert file.read_bytes() == b"content"


async def test_the_shipped_applications_may_block_their_loop(file):
    inside_aiockpt(file.read_bytes, "demo/trainer.py")


async def test_a_small_checksum_is_no_burden_to_a_loop():
    inside_aiockpt(lambda: zlib.crc32(bytes(1024)))


async def test_the_blocking_doors_may_wait_under_a_running_loop():
    inside_aiockpt(lambda: threading.Event().wait(0.001), "sync.py")


PICKLE_CALLS = {
    "dumps": lambda: pickle.dumps([1]),
    "loads": lambda: pickle.loads(b"N."),
    "Pickler": lambda: pickle.Pickler(io.BytesIO()).dump([1]),
}


@pytest.mark.parametrize("call", PICKLE_CALLS.values(), ids=PICKLE_CALLS)
def test_pickling_on_the_engines_loop_raises(call, blocking_calls):
    with pytest.raises(BlockingError):
        on_thread(ENGINE_THREAD, lambda: inside_aiockpt(call))
    blocking_calls.clear()


@pytest.mark.parametrize("call", PICKLE_CALLS.values(), ids=PICKLE_CALLS)
async def test_a_capture_may_pickle_on_its_callers_loop(call):
    inside_aiockpt(call)


@pytest.fixture
def before(tmp_path: Path) -> Census:
    return census(tmp_path)


def test_a_leaked_thread_is_named(before, tmp_path):
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="left-behind")
    thread.start()
    leaked = leaks_since(before, tmp_path, grace_s=0.01)
    gate.set()
    thread.join()
    assert leaked == ["thread 'left-behind'"]


def test_a_thread_that_is_ending_is_waited_for(before, tmp_path):
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait)
    thread.start()
    threading.Timer(0.01, gate.set).start()
    assert leaks_since(before, tmp_path) == []


def test_a_leaked_descriptor_is_named(before, tmp_path, file):
    fd = os.open(file, os.O_RDONLY)
    leaked = leaks_since(before, tmp_path)
    os.close(fd)
    assert f"1 x open {file}" in leaked


def test_a_leaked_temporary_directory_is_named(before, tmp_path):
    (tmp_path / "tmpabc").mkdir()
    assert leaks_since(before, tmp_path) == ["temporary 'tmpabc'"]


async def test_a_leaked_task_is_named():
    gate = asyncio.Event()
    before = asyncio.all_tasks()
    task = asyncio.create_task(gate.wait(), name="left-behind")
    leaked = await pending_tasks_since(before, grace_s=0.01)
    gate.set()
    await task
    assert len(leaked) == 1
    assert "left-behind" in leaked[0]


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_a_test_can_ask_for_other_loops(request):
    module = type(asyncio.get_running_loop()).__module__
    assert module.startswith(("asyncio", "uvloop"))
    assert module.split(".")[0] in request.node.name


LEAKY_TESTS = """
import asyncio, os, sys, tempfile, types
import pytest
from loop_guard import package_dir

KEPT = []
PROBE = types.ModuleType("aiockpt.probe")
SOURCE = "from os import listdir\\ndef block(): listdir()"
exec(compile(SOURCE, str(package_dir() / "probe.py"), "exec"), vars(PROBE))
sys.modules["aiockpt.probe"] = PROBE

async def test_blocked_loop_whose_error_is_lost():
    try:
        PROBE.block()
    except Exception:
        pass

def test_descriptor():
    KEPT.append(os.open(__file__, os.O_RDONLY))

def test_temporary_directory():
    tempfile.mkdtemp()

async def test_task():
    KEPT.append(asyncio.create_task(asyncio.Event().wait()))

@pytest.mark.leaks("to show that the marker works")
def test_on_purpose():
    tempfile.mkdtemp()

def test_failure_is_reported_without_its_debris():
    tempfile.mkdtemp()
    assert False

def test_clean():
    pass
"""


def test_the_guards_surround_every_test_unasked(pytester: pytest.Pytester):
    here = Path(__file__).parent
    pytester.makeconftest((here / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(LEAKY_TESTS)
    pytester.makepyprojecttoml(
        f"""
        [tool.pytest.ini_options]
        pythonpath = ["{here}", "{package_dir().parent}"]
        asyncio_mode = "auto"
        asyncio_default_fixture_loop_scope = "function"
        markers = ["leaks(reason)"]
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=6, failed=1, errors=4)
    found = ("blocked_loop", "descriptor", "temporary", "task")
    result.stdout.fnmatch_lines_random([f"*ERROR*test_{name}*" for name in found])
