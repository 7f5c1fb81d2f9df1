"""What is hostile is row 16 of the fault matrix, where that counts."""

from collections.abc import Generator

import pytest

from faults.matrix import Cases, cases_of, counted


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    with counted(pyfuncitem):
        return (yield)


@pytest.fixture(scope="session")
def cases(request: pytest.FixtureRequest) -> Cases:
    """Where a test counts its cases."""
    return cases_of(request.config)
