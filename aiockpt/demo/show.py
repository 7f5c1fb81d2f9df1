"""The show: train, be killed in the middle of a save, resume, and compare.

Each act is a process of its own, as a trainer under a scheduler is. The last one
does the same training without an interruption; if resuming is exact, its losses and
its final checkpoint are the same to the last bit. The checkpoints are compared as
plain `torch.load` reads them.
"""

__all__ = ["Act", "Verdict", "perform", "run"]

import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import torch
from rich.filesize import decimal as format_bytes

from aiockpt.demo.display import Display
from aiockpt.demo.trainer import (
    FILE,
    Event,
    Saved,
    Settings,
    Started,
    Stepped,
    tag_of,
)
from aiockpt.errors import CheckpointError
from aiockpt.manifest import PRIVATE_DIR

_EVENT: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


@dataclass(slots=True)
class Act:
    """What one run of the trainer did.

    Attributes:
        returncode: Exit status; the negative signal number if it was killed.
        complaint: The last line that it wrote to standard error.
        started: Its first event, if it came that far.
        steps: Its steps, in order.
        saves: The checkpoints that it saw published, in order.
    """

    returncode: int = 0
    complaint: str = ""
    started: Started | None = None
    steps: list[Stepped] = field(default_factory=list[Stepped])
    saves: list[Saved] = field(default_factory=list[Saved])

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step that was done."""
        return {step.step: step.loss for step in self.steps}

    def take(self, event: Event) -> None:
        """Remembers the event."""
        match event:
            case Started():
                self.started = event
            case Stepped():
                self.steps.append(event)
            case Saved():
                self.saves.append(event)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the interrupted training ended as the uninterrupted one did.

    Attributes:
        is_exact: Whether all losses and the final checkpoints are equal, bit for bit.
        num_steps: Steps whose losses were compared.
        different_steps: Steps whose losses differ.
        num_tensors: Tensors of the final checkpoint.
        different_tensors: Those whose values differ.
        killed_in: The tag in whose save the first run was killed.
        resumed_from: The tag from which the second went on.
        unpublished_bytes: Size of what the killed save left behind, unseen by loads.
        save_bytes: Size of one checkpoint.
        stall_s: Median time that training was held for a save.
        durable_s: Median time from a save's begin to its being durable.
    """

    is_exact: bool
    num_steps: int
    different_steps: list[int]
    num_tensors: int
    different_tensors: list[str]
    killed_in: str | None
    resumed_from: str | None
    unpublished_bytes: int
    save_bytes: int
    stall_s: float
    durable_s: float


def perform(
    settings: Settings, display: Callable[[str], Display], tell: Callable[[str], None]
) -> Verdict:
    """Plays the three acts under `settings.root` and compares.

    Args:
        settings: The training; `resume` and `kill` are the show's affair.
        display: Makes the display of an act with the given title.
        tell: Says a line between the acts.

    Raises:
        CheckpointError: An act ended in another way than it should.
    """
    interrupted = msgspec.structs.replace(settings, root=f"{settings.root}/interrupted")
    straight = msgspec.structs.replace(settings, root=f"{settings.root}/straight")

    doomed = msgspec.structs.replace(interrupted, kill=True)
    killed = _act(display("1 of 3: train, and be killed in a save"), doomed)
    _check_end(killed, -signal.SIGKILL)
    unpublished_bytes = _unpublished_bytes(Path(interrupted.root))
    tell(_aftermath(killed, unpublished_bytes))

    resumed = _act(display("2 of 3: the same command again"), interrupted)
    _check_end(resumed, 0)

    whole = _act(display("3 of 3: the same training, never interrupted"), straight)
    _check_end(whole, 0)
    return _verdict(settings, killed, resumed, whole, unpublished_bytes)


def run(settings: Settings, emit: Callable[[Event], None]) -> Act:
    """Runs the trainer in a process of its own and waits for its end.

    Args:
        settings: The run.
        emit: Told each event as it comes.
    """
    act = Act()
    text = msgspec.json.encode(settings).decode()
    command = [sys.executable, "-m", "aiockpt.demo.worker", text]
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(  # noqa: S603 - it is this package
            command, stdout=subprocess.PIPE, stderr=complaints
        ) as worker:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    event = _EVENT.decode(line)
                    act.take(event)
                    emit(event)
            except BaseException:
                worker.kill()
                raise
        complaints.seek(0)
        act.complaint = next(reversed(complaints.read().splitlines()), "")
    act.returncode = worker.returncode
    return act


def _act(display: Display, settings: Settings) -> Act:
    with display as show_event:
        return run(settings, show_event)


def _check_end(act: Act, returncode: int) -> None:
    if act.returncode != returncode:
        raise CheckpointError(
            f"the trainer ended with status {act.returncode}, "
            f"not {returncode}: {act.complaint}"
        )


def _unpublished_bytes(root: Path) -> int:
    work = root / PRIVATE_DIR
    return sum(
        Path(directory, name).stat().st_size
        for directory, _, names in os.walk(work)
        for name in names
    )


def _aftermath(killed: Act, unpublished_bytes: int) -> str:
    tag = killed.started.fatal_tag if killed.started else None
    published = ", ".join(save.published for save in killed.saves) or "nothing"
    return (
        f"Killed by SIGKILL after step {max(killed.losses)}, in the save of {tag}. "
        f"Published: {published}. "
        f"Left of {tag}: {format_bytes(unpublished_bytes)} that no load will see."
    )


def _verdict(
    settings: Settings, killed: Act, resumed: Act, whole: Act, unpublished_bytes: int
) -> Verdict:
    expected = whole.losses
    seen = [*killed.losses.items(), *resumed.losses.items()]
    # Compared as floats: a loss that is not a number would differ, as it should.
    wrong = {step for step, loss in seen if expected.get(step) != loss}
    missing = expected.keys() - {step for step, _ in seen}
    tensors, wrong_tensors = _compare_last_checkpoints(settings)
    saves = [*killed.saves, *resumed.saves, *whole.saves]
    return Verdict(
        is_exact=not (wrong or missing or wrong_tensors),
        num_steps=len(expected),
        different_steps=sorted(wrong | missing),
        num_tensors=tensors,
        different_tensors=wrong_tensors,
        killed_in=killed.started.fatal_tag if killed.started else None,
        resumed_from=resumed.started.resumed_from if resumed.started else None,
        unpublished_bytes=unpublished_bytes,
        save_bytes=saves[-1].nbytes,
        stall_s=statistics.median(save.stall_s for save in saves),
        durable_s=statistics.median(save.total_s for save in saves),
    )


def _compare_last_checkpoints(settings: Settings) -> tuple[int, list[str]]:
    """The number of tensors of the last checkpoint, and the keys of those that differ."""
    name = f"{tag_of(settings.steps)}/{FILE}"
    resumed, whole = (
        dict(_tensors(torch.load(f"{settings.root}/{run}/{name}", weights_only=True)))
        for run in ("interrupted", "straight")
    )
    keys = resumed.keys() | whole.keys()
    return len(keys), sorted(
        key
        for key in keys
        if key not in resumed
        or key not in whole
        or not torch.equal(resumed[key], whole[key])
    )


def _tensors(value: object, key: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    match value:
        case torch.Tensor():
            yield key, value
        case dict():
            for name, item in cast("dict[object, object]", value).items():
                yield from _tensors(item, f"{key}.{name}" if key else str(name))
        case _:
            pass
