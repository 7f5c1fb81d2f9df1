"""Row 14: a network that fails costs no tag, and nobody waits for ever.

Two ranks, each in a network namespace of its own, with nothing between the two but
their cable, and no way out.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiockpt.testing.roots import assert_root_consistent
from faults.acts import CUTS, LATE_CUTS
from faults.matrix import Cases
from faults.places import run_command
from jobs import Jobs
from workloads import SMALL, Engine, save

pytestmark = pytest.mark.dist
HOSTS = ("10.213.77.1", "10.213.77.2")

# Which rank is cut off, at which call, and before or after it.
MOMENTS: dict[str, tuple[int, list[str]]] = {
    "rank 1, before its word": (1, ["commit", "before"]),
    "rank 0, before its word": (0, ["commit", "before"]),
    "rank 0, before it publishes": (0, ["decide", "before"]),
    "rank 0, when it has published": (0, ["decide", "after"]),
}


@pytest.fixture(scope="module")
def namespaces(cases: Cases) -> Iterator[list[str]]:
    """The names of two, joined by a cable."""
    missing = [name for name in ("ip", "iptables", "tc") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        reason = f"network namespaces need root, ip, iptables and tc; missing {missing}"
        if cases.is_long:
            pytest.fail(reason)
        pytest.skip(reason)
    names = [f"aiockpt-{os.getpid()}-{rank}" for rank in (0, 1)]
    with contextlib.ExitStack() as stack:
        for name in names:
            run_command("ip", "netns", "add", name)
            stack.callback(run_command, "ip", "netns", "del", name)
        ends = ("netns", names[0], "type", "veth", "peer", "name", "eth")
        run_command("ip", "link", "add", "eth", *ends, "netns", names[1])
        for name, host in zip(names, HOSTS, strict=True):
            within = ("ip", "-n", name)
            run_command(*within, "address", "add", f"{host}/30", "dev", "eth")
            run_command(*within, "link", "set", "eth", "up")
            assert run_command(*within, "route", "show", "default") == ""
        yield names


def whole_again(namespace: str) -> None:
    """The cable is as it was before the cut."""
    within = ("ip", "netns", "exec", namespace)
    run_command(*within, "iptables", "-F")
    if "tbf" in run_command(*within, "tc", "qdisc", "show", "dev", "eth"):
        run_command(*within, "tc", "qdisc", "del", "dev", "eth", "root")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("cut", CUTS)
def test_a_network_that_fails_costs_no_tag_and_holds_up_nobody(
    cases, jobs: Jobs, memory: Path, namespaces: list[str], cut, moment
):
    at, call = MOMENTS[moment]
    for number in range(cases.pick(1, 7)):
        place = memory / f"cut {cut} {moment} {number}".replace(" ", "-")
        root = place / "runs"
        with Engine(root, SMALL) as engine:
            save(engine, "before", 1)
        request = {"cut": cut, "at": at, "moment": call, "namespaces": namespaces}
        results = jobs.run(
            "faults.acts:be_cut_off", 2, root=str(root), host=HOSTS[0], **request
        )
        whole_again(namespaces[at])
        with cases.case(14, cut, f"{moment}: {results}"):
            assert {"died": signal.SIGALRM} not in results, "it waited for ever"
            check(root, results, cut, moment)
            with Engine(root, SMALL) as engine:
                save(engine, "a", 1, overwrite="a" in seen(engine))
            assert_root_consistent(root, acked=["before", "a"], is_swept=True)
        shutil.rmtree(place)


def check(root: Path, results: list[Any], cut: str, moment: str) -> None:
    told = [result["told"] for result in results]
    failed = [each for each in told if isinstance(each, dict)]
    assert all(each["error"] == "PeerError" for each in failed), told
    tags = assert_root_consistent(root, acked=["before"])
    # Whatever the others can be told: the tag is there if rank 0 says so.
    assert ("a" in tags) == isinstance(told[0], str), told
    if cut in LATE_CUTS:
        # Late, and within the time that ranks wait.
        assert not failed, told
    elif "rank 1" in moment:
        assert len(failed) == 2, told
    elif "a" in tags and failed:
        # Nobody could tell it; it is told by the root.
        assert told[1]["rank"] == 0, told
        assert any("had published" in note for note in told[1]["notes"]), told


def seen(engine: Engine) -> list[str]:
    return [info.tag for info in engine.tags()]
