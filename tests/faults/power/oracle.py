"""What may be found after a power cut, and whether it is."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiockpt.errors import CheckpointError
from aiockpt.testing.roots import assert_root_consistent
from faults.power.contenders import Aiockpt, is_state


class Oracle:
    """What each name may hold: one state, or one of two while a step is under way.

    Attributes:
        allowed: By name, the seeds that it may hold; None: nothing has the name.
        acked: The names that surely hold something, in the order of their last `done`.
        num_acked: Steps that were acknowledged.
    """

    def __init__(self) -> None:
        self.allowed: dict[str, set[int | None]] = {}
        self.acked: list[str] = []
        self.num_acked = 0

    def take(self, records: Iterable[dict[str, Any]]) -> None:
        """Takes in what a writer told."""
        for record in records:
            _, name, seed = record.get("begin") or record["done"]
            if "begin" in record:
                self.allowed[name] = {*self.allowed.get(name, {None}), seed}
                if seed is None:
                    self.acked.remove(name)
                continue
            self.num_acked += 1
            self.allowed[name] = {seed}
            self.acked = [other for other in self.acked if other != name]
            if seed is not None:
                self.acked.append(name)

    def settle(self, name: str, found: int | None) -> None:
        """After a cut: what is there now is what there is."""
        self.allowed[name] = {found}
        if found is None:
            self.acked = [other for other in self.acked if other != name]


def check_aiockpt(root: Path, oracle: Oracle) -> None:
    """All that was acknowledged is there to the last bit, and nothing torn is."""
    if not root.exists():
        assert not oracle.acked, f"{root} is lost, and with it {oracle.acked}"
        return
    assert_root_consistent(root, acked=oracle.acked)
    engine = Aiockpt(root)
    try:
        tags = engine.tags()
        assert {*tags} <= oracle.allowed.keys(), f"{tags}: who saved these?"
        for name, allowed in oracle.allowed.items():
            loaded = engine.load(name)
            found = None if loaded is None else int(loaded["seed"])
            assert found in allowed, f"{name} is {found}, not one of {allowed}"
            assert found is None or is_state(loaded, found), f"{name} is not {found}"
            oracle.settle(name, found)
    finally:
        engine.close()
    oracle.acked = tags
    assert_root_consistent(root, acked=tags, is_swept=True)


def has_lost(root: Path, oracle: Oracle) -> bool:
    """Whether it is not so."""
    try:
        check_aiockpt(root, oracle)
    except (AssertionError, CheckpointError):
        return True
    return False
