"""What a run looks like: a live panel on a terminal, plain lines elsewhere."""

__all__ = ["Display", "Lines", "LivePanel", "Silence", "display"]

import statistics
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.filesize import decimal as format_bytes
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aiockpt.demo.trainer import Event, Saved, Started, Stepped

_LINE_EVERY_STEPS = 10
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_COLUMNS = 40


class Display(Protocol):
    """Shows the events of one run; a context manager around it."""

    def __call__(self, event: Event) -> None:
        """Takes in one event."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def display(console: Console, title: str, *, is_doomed: bool = False) -> Display:
    """The display that suits the console.

    Args:
        console: Where to show it.
        title: What is being run.
        is_doomed: Whether this very process will be killed: a live panel would
            leave the terminal without its cursor.
    """
    if console.is_terminal and not is_doomed:
        return LivePanel(console, title)
    return Lines(console, title)


class Silence:
    """Shows nothing."""

    def __call__(self, event: Event) -> None:
        """Takes the event and shows nothing."""

    def __enter__(self) -> Self:
        """Shows nothing."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Has nothing to undo."""


class Lines:
    """A line per ten steps and per checkpoint."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._steps = 0

    def __enter__(self) -> Self:
        """Prints the title."""
        self._print(self._title)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Has nothing to undo."""

    def __call__(self, event: Event) -> None:
        """Prints the event, if it is one that counts."""
        match event:
            case Started():
                self._steps = event.steps
                self._print(f"  {_start(event)}")
            case Stepped() if _is_shown(event.step, self._steps):
                self._print(f"  {_step(event, self._steps)}")
            case Saved():
                self._print(f"  {_save(event)}")
            case _:
                pass

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LivePanel:
    """A panel that is redrawn in place."""

    def __init__(self, console: Console, title: str) -> None:
        self._title = title
        self._started: Started | None = None
        self._steps: list[Stepped] = []
        self._saves: list[Saved] = []
        # Last: it asks for a first picture at once.
        self._live = Live(
            get_renderable=self._draw, console=console, refresh_per_second=10
        )

    def __enter__(self) -> Self:
        """Draws from now on, several times a second, in a thread of its own."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draws once more and leaves the panel standing."""
        self._live.stop()

    def __call__(self, event: Event) -> None:
        """Takes the event in; it shows with the next redraw."""
        match event:
            case Started():
                self._started = event
            case Stepped():
                self._steps.append(event)
            case Saved():
                self._saves.append(event)

    def _draw(self) -> Panel:
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim")
        rows.add_column()
        if self._started is not None:
            rows.add_row("start", Text(_start(self._started)))
            rows.add_row("step", self._step_bar(self._started))
        if self._steps:
            rows.add_row("loss", self._loss())
        if self._saves:
            save = self._saves[-1]
            rows.add_row("saved", Text(_save(save), style="green"))
            rows.add_row("ring", _bar(save.peak_ring_bytes, save.ring_bytes))
        return Panel(rows, title=Text(self._title, style="bold"), title_align="left")

    def _step_bar(self, started: Started) -> Table:
        done = self._steps[-1].step if self._steps else started.step
        line = Table.grid(padding=(0, 1))
        text = f"{done}/{started.steps}"
        if self._steps:
            median_s = statistics.median(step.elapsed_s for step in self._steps)
            text += f"  {median_s * 1e3:.0f} ms a step"
        line.add_row(_bar(done, started.steps), text)
        return line

    def _loss(self) -> Text:
        losses = [step.loss for step in self._steps]
        return Text.assemble(
            (spark(losses, _SPARK_COLUMNS), "cyan"), f" {losses[-1]:.4f}"
        )


def spark(values: Sequence[float], columns: int) -> str:
    """A chart one line high: the last value of each of `columns` equal spans."""
    count = min(columns, len(values))
    picked = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    low, high = min(picked), max(picked)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in picked)


def _is_shown(step: int, steps: int) -> bool:
    return step % _LINE_EVERY_STEPS == 0 or step == steps


def _start(event: Started) -> str:
    origin = (
        "fresh start"
        if event.resumed_from is None
        else f"resumed from {event.resumed_from}"
    )
    text = f"{origin}, {event.num_parameters / 1e6:.1f} M parameters"
    if event.fatal_tag is not None:
        text += f"; will be killed by SIGKILL in the save of {event.fatal_tag}"
    return text


def _step(event: Stepped, steps: int) -> str:
    step_ms = event.elapsed_s * 1e3
    return f"step {event.step}/{steps}  loss {event.loss:.4f}  {step_ms:.0f} ms"


def _save(event: Saved) -> str:
    throughput = format_bytes(round(event.nbytes / event.total_s))
    return (
        f"{event.published} published: {format_bytes(event.nbytes)}, "
        f"training held {event.stall_s * 1e3:.1f} ms, "
        f"durable after {event.total_s * 1e3:.0f} ms ({throughput}/s), "
        f"ring peak {format_bytes(event.peak_ring_bytes)}"
        f" of {format_bytes(event.ring_bytes)}"
    )


def _bar(completed: int, total: int) -> ProgressBar:
    return ProgressBar(total=total, completed=completed, width=_SPARK_COLUMNS)
