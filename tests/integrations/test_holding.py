"""Methods of frameworks that wait for staging, as steps do."""

from collections.abc import Iterator

import pytest

from aiockpt.integrations import holding
from aiockpt.integrations.holding import hold


class Framework:
    """Changes weights in ways of its own."""

    def swap(self, *, first: str) -> str:
        """Gives what it was given."""
        return f"swapped {first}"

    @staticmethod
    def average(first: str) -> str:
        """Gives what it was given."""
        return f"averaged {first}"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each wait."""
    waits: list[str] = []
    monkeypatch.setattr(holding, "before_change", lambda: waits.append("waited"))
    kept = {name: vars(Framework)[name] for name in ("swap", "average")}
    yield waits
    for name, method in kept.items():
        setattr(Framework, name, method)


def test_methods_wait_and_do_what_they_did(waits):
    hold(Framework, "swap", "average", "not there")

    assert Framework().swap(first="a") == "swapped a"
    assert Framework.average("b") == Framework().average("b") == "averaged b"
    assert len(waits) == 3


def test_holding_twice_is_holding_once(waits):
    hold(Framework, "swap", "average")
    hold(Framework, "swap", "average")

    Framework().swap(first="a")
    Framework().average("b")
    assert len(waits) == 2


def test_calls_that_change_nothing_do_not_wait(waits):
    hold(Framework, "swap", where=lambda _self, *, first: first == "a")

    assert Framework().swap(first="b") == "swapped b"
    assert waits == []
    Framework().swap(first="a")
    assert len(waits) == 1
