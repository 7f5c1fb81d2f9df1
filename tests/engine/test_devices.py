"""Saving from devices and loading to them, with devices that are only pretended."""

import pytest

from device_load_scenarios import LOAD_SCENARIOS
from device_scenarios import SCENARIOS, run

ALL_SCENARIOS = {**SCENARIOS, **LOAD_SCENARIOS}


# Copies as late as they may be, or as early; the caller's kernels likewise.
@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "lazy"])
@pytest.mark.parametrize("is_lazy", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("name", ALL_SCENARIOS)
async def test_it_holds_however_late_a_device_is(name, is_lazy, is_eager, root):
    await run(ALL_SCENARIOS[name], root, is_lazy=is_lazy, is_eager=is_eager)
