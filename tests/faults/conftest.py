"""The fault matrix: its options, its count, and the places where it runs.

`--faults` asks for the long run, in which a test that cannot run fails;
`--faults-report=PATH` adds the counts, as JSON lines, to a file.
"""

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from crashing import Server
from faults.driver import make_template
from faults.matrix import Cases, Report, cases_of, counted
from jobs import Jobs


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption(
        "--faults",
        action="store_true",
        help="the long counts of the fault matrix; what cannot run fails",
    )
    group.addoption(
        "--faults-share",
        type=float,
        default=1.0,
        help="do this part of the long counts",
    )
    group.addoption(
        "--faults-report",
        type=Path,
        metavar="PATH",
        help="add the counts of the fault matrix to this file, as JSON lines",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--faults-report", default=None)
    is_shared = config.getoption("numprocesses", default=None)
    if path is not None and not is_shared:
        config.pluginmanager.register(Report(cases_of(config), path))


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """A sweep is hundreds of cases: it has minutes, and in the long run an hour."""
    limit_s = 3600 if cases_of(config).is_long else 300
    here = Path(__file__).parent
    for item in items:
        is_here = item.path.is_relative_to(here)
        if is_here or item.path.is_relative_to(here.with_name("hostile")):
            item.add_marker(pytest.mark.timeout(limit_s))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    with counted(pyfuncitem):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes that share the tests tells the first of its cases."""
    told: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["faults"] = list(cases_of(session.config).lines())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Adds what such a process has told; one that has died tells nothing."""
    told: dict[str, Any] = getattr(node, "workeroutput", {})
    cases_of(node.config).add(told.get("faults", ()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = list(cases_of(config).lines())
    if lines:
        terminalreporter.section("fault matrix: survived/cases")
        for line in lines:
            counts = f"{line['survived']}/{line['cases']}"
            name = f"{line['row']:>3}  {line['name']}: {line['fault']}"
            terminalreporter.line(f"{name:<70} {counts:>12}")


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> Cases:
    """Where a test counts its cases."""
    return cases_of(request.config)


@pytest.fixture
def as_root(cases: Cases) -> None:
    """What follows needs root; in the long run its lack is a failure."""
    if os.geteuid() != 0:
        reason = "mounts file systems of its own: needs root"
        if cases.is_long:
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The process that forks those who are killed."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    """The process that forks the ranks of jobs."""
    with Jobs() as jobs:
        yield jobs


@pytest.fixture(scope="session")
def lasting_memory() -> Iterator[Path]:
    """A place in memory, where a sync costs nothing, for all of the tests."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def memory(lasting_memory: Path) -> Iterator[Path]:
    """A place in memory for one test, given back after it: a sweep fills gigabytes."""
    with tempfile.TemporaryDirectory(dir=lasting_memory) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def template(lasting_memory: Path) -> Path:
    """A root with two tags; tests take copies of it."""
    return make_template(lasting_memory / "template")
