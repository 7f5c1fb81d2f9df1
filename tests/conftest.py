"""Fixtures of every test: the guards that run unasked, and a place to save to."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest

from aiockpt.ring import Ring
from leaks import census, leaks_since, pending_tasks_since
from loop_guard import blocking_calls_raise

# A job in the background is started with Ctrl-C ignored, and so would be every program
# that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_FAILED = pytest.StashKey[bool]()

# A shared machine's clock says nothing, so no profile has a deadline. The nightly
# one looks for what the others would take years to meet.
hypothesis.settings.register_profile(
    "default", max_examples=50, stateful_step_count=30, deadline=None, print_blob=True
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), max_examples=200, database=None
)
hypothesis.settings.register_profile(
    "nightly",
    hypothesis.settings.get_profile("default"),
    max_examples=1000,
    stateful_step_count=200,
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if "CI" in os.environ else "default")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a missing GPU; watches the tasks of tests that have a loop."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for item in items:
        if item.get_closest_marker("asyncio") and isinstance(item, pytest.Function):
            item.fixturenames.insert(0, "no_task_outlives_the_test")


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, object]:
    """asyncio's own loop, unless `@pytest.mark.asyncio(loop_factories=...)` asks."""
    factories: dict[str, object] = {"asyncio": asyncio.new_event_loop}
    marker = item.get_closest_marker("asyncio")
    if marker and "uvloop" in marker.kwargs.get("loop_factories", ()):
        import uvloop

        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Remembers a failure, so that its debris is not reported on top of it."""
    report = yield
    if report.failed:
        item.stash[HAS_FAILED] = True
    return report


@pytest.fixture(scope="session", autouse=True)
def private_temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`tempfile` of this process works where nobody else does."""
    path = tmp_path_factory.mktemp("temp")
    before, tempfile.tempdir = tempfile.tempdir, str(path)
    yield path
    tempfile.tempdir = before


@pytest.fixture(autouse=True)
def nothing_outlives_the_test(
    request: pytest.FixtureRequest, private_temp_dir: Path
) -> Iterator[None]:
    """Threads, open files and temporary files that a test began must have ended."""
    before = census(private_temp_dir)
    yield
    if _is_watched(request.node):
        leaked = leaks_since(before, private_temp_dir)
        assert not leaked, "the test left behind:\n" + "\n".join(leaked)


@pytest.fixture(autouse=True)
def no_lease_outlives_its_engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A ring that is closed must have all its chunks back."""
    leased: list[int] = []
    close = Ring.close

    def close_and_tell(ring: Ring) -> None:
        leased.append(ring.leased_bytes)
        close(ring)

    monkeypatch.setattr(Ring, "close", close_and_tell)
    yield
    if _is_watched(request.node):
        assert not any(leased), f"bytes still leased when a ring was closed: {leased}"


@pytest.fixture
async def no_task_outlives_the_test(
    request: pytest.FixtureRequest,
) -> AsyncIterator[None]:
    """Tasks that a test began on its own loop must have ended."""
    before = asyncio.all_tasks()
    yield
    if _is_watched(request.node):
        pending = await pending_tasks_since(before)
        assert not pending, "the test left behind:\n" + "\n".join(pending)


@pytest.fixture(autouse=True)
def blocking_calls(nothing_outlives_the_test: None) -> Iterator[list[str]]:
    """The calls by which aiockpt blocked an event loop: there must be none.

    Each raised already where it was made; a test that expects one clears the list.
    """
    with blocking_calls_raise() as caught:
        yield caught
    assert not caught, "an event loop was blocked by:\n" + "\n".join(caught)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where an engine may keep its tags; not made yet."""
    return tmp_path / "root"


def _is_watched(item: pytest.Item) -> bool:
    if marker := item.get_closest_marker("leaks"):
        assert marker.args, "`leaks` takes the reason"
        return False
    return not item.stash.get(HAS_FAILED, False)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
