"""A file from anywhere is opened or refused; it runs nothing and takes no memory."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from aiockpt import errors
from hostile.case import EITHER, Expected
from hostile.hostile_files import SAFETENSORS, TORCH
from hostile.opening import MIB, Opener

# Beyond the bytes of the file itself.
MAX_GROWN_MIB = 200

CASES = [
    *(pytest.param(case, "file.pt", id=case.name) for case in TORCH),
    *(pytest.param(case, "file.safetensors", id=case.name) for case in SAFETENSORS),
]


@pytest.fixture(scope="module")
def opener():
    with Opener() as opener:
        yield opener


@pytest.mark.case(16, "a file of the catalogue")
@pytest.mark.parametrize(("case", "name"), CASES)
def test_a_file_from_anywhere_is_opened_or_refused(case, name, opener, tmp_path):
    path = tmp_path / name
    path.write_bytes(case.build())

    found = opener.open(path)

    assert "died" not in found, found
    outcomes = found["outcomes"]
    assert not [door for door in outcomes if "untyped" in outcomes[door]], outcomes
    for door in ("load", "inspect", "verify"):
        assert_expected(getattr(case, door), outcomes[door], door)
    # What is opened is what the format's own reader makes of it, where it does.
    assert found["is_as_torch"] is not False
    assert found["grown_mib"] - path.stat().st_size / MIB < MAX_GROWN_MIB
    own = own_events(path, names_device="cuda" in case.name)
    assert [event for event in found["touched"] if event not in own] == []
    assert [file.name for file in tmp_path.iterdir()] == [name]


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def _device(kind: int, major: int, minor: int) -> Callable[[Path], None]:
    return lambda path: os.mknod(path, kind | 0o644, os.makedev(major, minor))


# What would be waited for, or read without end, and a link to what is not there.
NO_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "a socket": _socket,
    "/dev/zero": _device(stat.S_IFCHR, 1, 5),
    "a terminal": _device(stat.S_IFCHR, 5, 0),
    "a block device": _device(stat.S_IFBLK, 7, 200),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.case(16, "no file at all")
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_is_refused_at_once(
    cases, make, name, opener, tmp_path, monkeypatch
):
    # A socket's name may not be long.
    monkeypatch.chdir(tmp_path)
    try:
        make(Path(name))
    except PermissionError:
        if cases.is_long:
            pytest.fail("devices are made by root")
        pytest.skip("devices are made by root")

    found = opener.open(tmp_path / name)

    assert "died" not in found, found
    told = {door: found["outcomes"][door].get("error") for door in found["outcomes"]}
    assert set(told.values()) <= {"StorageError", "CheckpointNotFoundError"}, told


def assert_expected(expected: Expected, outcome: dict[str, str], door: str) -> None:
    if expected is None:
        assert not outcome, door
    elif expected is not EITHER:
        assert outcome, door
        assert issubclass(getattr(errors, outcome["error"]), expected), (door, outcome)


def own_events(path, *, names_device: bool) -> list[str]:
    """Opening the file, and its directory on the way; a driver only if it names one."""
    opened = [f"open {name!r}" for name in (str(path), str(path.parent), path.name)]
    return [*opened, "ctypes.dlopen 'libcuda.so.1'"] if names_device else opened


def test_the_catalogue_is_long_and_its_names_are_unique():
    names = [case.name for case in TORCH + SAFETENSORS]
    assert len(names) == len(set(names)) > 120


def test_code_that_does_run_is_caught(opener, tmp_path):
    # The watch itself must work: a trusted pickle of the same kind leaves a trace.
    path = tmp_path / "trusted.pt"
    path.write_bytes(next(c for c in TORCH if c.name == "pickle: os.system").build())

    found = opener.open(path, trusted=True)

    assert any(event.startswith("os.system") for event in found["touched"])
    assert (tmp_path / "canary").exists()
