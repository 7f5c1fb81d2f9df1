"""Many processes follow one that publishes, and keep up with its retention."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import aiockpt
import followers
from aiockpt.testing.roots import assert_root_consistent
from catalogs import leftovers, names_in

NUM_READERS = 8


@pytest.mark.parametrize(
    "num_versions",
    [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_every_reader_sees_versions_in_order_and_whole_and_keeps_what_it_holds(
    root, num_versions
):
    done = run(root, num_versions)

    for seeds, num_missed, num_stays in done["told"]:
        assert seeds == sorted(set(seeds))
        assert seeds[-1] == num_versions
        assert len(seeds) + num_missed <= num_versions
        assert num_stays > 0
    assert done["statuses"] == [0] * NUM_READERS
    kept = [f"version-{num_versions + each}" for each in (0, 1)]
    assert sorted(names_in(root)) == ["latest", *sorted(kept)]
    assert leftovers(root) == []
    assert_root_consistent(root, is_swept=True)


def run(root: Path, num_versions: int) -> dict[str, list]:
    package = Path(aiockpt.__file__).parent.parent
    command = [sys.executable, followers.__file__, root, num_versions, NUM_READERS]
    done = subprocess.run(
        list(map(str, command)),
        env={"PYTHONPATH": f"{package}"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
