"""Row 5: a power cut at any moment loses nothing that was acknowledged."""

import pytest

from faults.power.contenders import BROKEN, BUFFERED
from faults.power.cuts import Cutter
from faults.power.oracle import Oracle, check_aiockpt, has_lost

# How many cuts, in the ordinary run and in the long one, for either way of writing.
KINDS = {"ext4": (30, 2500), "xfs": (30, 2500), "btrfs": (10, 250)}
MAX_CUTS_OF_A_MUTANT = 40


@pytest.mark.parametrize("way", ["direct", "buffered"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_loses_nothing_that_was_acknowledged(
    cases, writers, disk, kind, way
):
    name = "aiockpt" if way == "direct" else f"aiockpt{BUFFERED}"
    cutter, oracle = Cutter(writers, disk, name, 1, is_deleting=True), Oracle()
    for _ in range(cases.pick(*KINDS[kind])):
        when = cutter.cut(oracle)
        with cases.case(5, f"{kind}, {way} writes", when):
            check_aiockpt(cutter.root, oracle)
    assert oracle.num_acked > 0


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_power_cut_shows_what_a_mutant_does_not_sync(
    cases, writers, disk, kind, name
):
    cutter, oracle = Cutter(writers, disk, name, seed=2), Oracle()
    with cases.case(20, f"{name}, power cut on {kind}", ""):
        assert any(
            cutter.cut(oracle) and has_lost(cutter.root, oracle)
            for _ in range(MAX_CUTS_OF_A_MUTANT)
        )
