"""`aiockpt.ranks.torch_dist`: real processes of a `torch.distributed` job."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker.py")

pytestmark = pytest.mark.dist


class Job:
    """The processes of a job, by rank."""

    def __init__(self, processes: Sequence["subprocess.Popen[str]"]) -> None:
        self.processes = processes

    def tell(self, do, topic="", group=None, ranks=None) -> None:
        for rank in self.ranks(ranks):
            stdin = self.processes[rank].stdin
            stdin.write(json.dumps([do, topic, group]) + "\n")
            stdin.flush()

    def answers(self, ranks=None) -> list[object]:
        return [
            json.loads(self.processes[rank].stdout.readline())
            for rank in self.ranks(ranks)
        ]

    def ask(self, do, topic="", group=None, ranks=None) -> list[object]:
        self.tell(do, topic, group, ranks)
        return self.answers(ranks)

    def send(self, signal_number: int, rank: int) -> None:
        self.processes[rank].send_signal(signal_number)

    def ranks(self, ranks) -> Sequence[int]:
        return range(len(self.processes)) if ranks is None else ranks


@contextlib.contextmanager
def job(
    world_size: int, timeout_s: float = 30, *, store: Path | None = None
) -> Iterator[Job]:
    """Processes that have told which ranks they found; their store is TCP or a file."""
    with contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Rank 0 inherits the socket: a port that is only noted would be taken by
            # somebody else while the processes import torch.
            port, descriptor = listener.getsockname()[1], listener.fileno()
            place = f"{port}:{descriptor}" if store is None else f"{store}"
            processes = []
            for rank in range(world_size):
                options = [place, f"{rank}", f"{world_size}", f"{timeout_s}"]
                process = subprocess.Popen(
                    [sys.executable, str(WORKER), *options],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[] if rank else [descriptor],
                    text=True,
                )
                stack.enter_context(process)
                stack.callback(process.kill)
                processes.append(process)
        found = Job(processes)
        kind = "SingleRank" if world_size == 1 else "TorchDistRanks"
        assert found.answers() == [kind] * world_size
        yield found


def test_a_world_of_one_is_a_single_rank():
    with job(1) as found:
        assert found.ask("consult", "t") == ["0"]


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_ranks_decide_without_the_process_group(kind, tmp_path):
    store = tmp_path / "store" if kind == "file" else None
    with job(2, store=store) as found:
        before = found.ask("collectives")
        for _ in range(3):
            assert found.ask("consult", "t") == ["0|1"] * 2
        assert found.ask("collectives") == before
        # Nothing of it is needed any more.
        found.ask("destroy")
        assert found.ask("consult", "t", [1, 0]) == ["1|0"] * 2
        assert found.ask("close") == ["closed"] * 2


def test_an_objection_reaches_all_processes():
    with job(3) as found:
        found.tell("consult", "t", ranks=[0, 1])
        text = "rank 2 failed in write: OSError: disk full"
        assert found.ask("object", "t", ranks=[2]) == [text]
        expected = ["PeerError", text, 2, "write"]
        assert found.answers([0, 1]) == [expected] * 2


def test_a_killed_rank_is_named_at_once_by_all_others():
    with job(4) as found:
        assert found.ask("consult", "t") == ["0|1|2|3"] * 4
        found.tell("consult", "t", ranks=[0, 1, 2])
        found.send(signal.SIGKILL, 3)
        expected = ["PeerError", "rank 3 was lost", 3, "lost"]
        assert found.answers([0, 1, 2]) == [expected] * 3
        assert found.ask("consult", "t", ranks=[0, 1, 2]) == [expected] * 3
        assert found.ask("consult", "t", [2, 1], ranks=[1, 2]) == ["2|1"] * 2


def test_when_rank_0_is_killed_all_others_name_it():
    with job(3) as found:
        assert found.ask("consult", "t") == ["0|1|2"] * 3
        found.tell("consult", "t", ranks=[1, 2])
        found.send(signal.SIGKILL, 0)
        expected = ["PeerError", "rank 0 was lost", 0, "lost"]
        assert found.answers([1, 2]) == [expected] * 2


def test_a_stopped_rank_is_named_when_the_time_is_over():
    with job(2, timeout_s=5) as found:
        assert found.ask("consult", "t") == ["0|1"] * 2
        found.send(signal.SIGSTOP, 1)
        text = "rank 1 did not come to 't' within 5 s"
        assert found.ask("consult", "t", ranks=[0]) == [["PeerError", text, 1, "late"]]
        found.send(signal.SIGCONT, 1)
        assert found.ask("consult", "t", ranks=[1]) == [["PeerError", text, 1, "late"]]
        assert found.ask("consult", "t") == ["0|1"] * 2


def test_a_stopped_rank_0_is_given_up_when_the_time_is_over():
    with job(2, timeout_s=5) as found:
        assert found.ask("consult", "t") == ["0|1"] * 2
        found.send(signal.SIGSTOP, 0)
        text = "rank 0 said nothing for 10 s"
        assert found.ask("consult", "t", ranks=[1]) == [["PeerError", text, 0, "lost"]]
        found.send(signal.SIGCONT, 0)
        (raised,) = found.ask("consult", "u", ranks=[0])
        assert raised == ["PeerError", "rank 1 was lost", 1, "lost"]


def test_ranks_wait_no_longer_than_agreed_for_a_rank_0_that_never_calls():
    with job(2, timeout_s=5) as found:
        (raised,) = found.ask("consult", "t", ranks=[1])
        assert raised[0] == "PeerError"
        assert raised[2:] == [0, "connect"]
        # It can be tried again, and rank 0 does not mind.
        assert found.ask("consult", "t") == ["0|1"] * 2


def test_a_rank_that_closes_is_no_mystery():
    with job(2) as found:
        assert found.ask("consult", "t") == ["0|1"] * 2
        found.tell("consult", "t", ranks=[1])
        assert found.ask("close", ranks=[0]) == ["closed"]
        expected = ["PeerError", "rank 0 has closed", 0, "closed"]
        assert found.answers([1]) == [expected]
