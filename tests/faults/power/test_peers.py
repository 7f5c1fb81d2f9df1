"""The comparison with others counts what they lose, and finds nothing of aiockpt."""

import dataclasses

import pytest

from faults.peers import LOST, changes, cut_power, damage
from faults.power.cuts import Cutter

NUM_CUTS = 4


@pytest.mark.parametrize("kind", ["ext4"])
@pytest.mark.parametrize("name", ["aiockpt", "torch.save"])
def test_what_a_power_cut_takes_is_counted(writers, disk, name):
    cutter = Cutter(writers, disk, name, seed=4, num_names=None)

    losses = cut_power(cutter, name, NUM_CUTS, is_new=True)

    assert (losses.cuts, losses.acknowledged > 0) == (NUM_CUTS, True)
    lost = sum(dataclasses.asdict(losses)[key] for key in LOST)
    assert (lost == 0) == (name == "aiockpt")


@pytest.mark.parametrize("name", ["aiockpt", "safetensors save_file"])
def test_what_is_loaded_of_damaged_files_is_counted(tmp_path, name):
    damages = damage(name, tmp_path, changes()["a bit flipped"], 20)

    assert damages.detected + damages.harmless + damages.undetected == 20
    assert (damages.undetected == 0) == (name == "aiockpt")
