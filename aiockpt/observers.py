"""Observers that ship with the engine: one that logs, one that draws.

    async with aiockpt.CheckpointEngine(root, observers=[LoggingObserver()]) as engine:
        ...

An observer is called on the engine's own thread. Both return at once:
`LoggingObserver` as fast as the logging handlers do, `ProgressBar` always.
"""

__all__ = ["LoggingObserver", "ProgressBar"]

import logging
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal as format_bytes
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from aiockpt.events import (
    CommitReport,
    Event,
    Failed,
    Planned,
    Published,
    Staged,
    Synced,
    Written,
)

# The newest so many tags are in sight.
_MAX_TAGS = 4
_BAR_COLUMNS = 30


class LoggingObserver:
    """Logs every event: files at DEBUG, published tags at INFO, failures at ERROR."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        """Logs to `logger`, by default the one called `aiockpt`."""
        self._logger = logger or logging.getLogger("aiockpt")

    def __call__(self, event: Event) -> None:
        """Logs one event. The error of a failure is logged without its traceback.

        `commit` raises that error, and whoever catches it has the traceback.
        """
        match event:
            case Published(report):
                self._log_published(report)
            case Failed(tag, path, error):
                place = tag if path is None else f"{tag}/{path}"
                kind = type(error).__name__
                self._logger.error("%s failed: %s: %s", place, kind, error)
            case Synced(tag, num_files, nbytes, elapsed_s):
                text = "%s synced: %d files, %d bytes, %.3f s"
                self._logger.debug(text, tag, num_files, nbytes, elapsed_s)
            case Planned() | Staged() | Written():
                verb = type(event).__name__.lower()
                text = "%s/%s %s: %d bytes, %.3f s"
                where = (event.tag, event.path)
                self._logger.debug(text, *where, verb, event.nbytes, event.elapsed_s)

    def _log_published(self, report: CommitReport) -> None:
        self._logger.info(
            "%s published: %d files, %d bytes, %.3f s, %.1f MB/s, held training %.1f ms",
            report.tag,
            report.num_files,
            report.nbytes,
            report.total_s,
            report.throughput_bytes_per_s / 1e6,
            report.stall_s * 1e3,
        )


class ProgressBar:
    """Draws a bar for each of the newest tags and their files; a context manager.

    Nothing is drawn where the console is not a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Will draw on `console`, by default on standard error."""
        self._console = console or Console(stderr=True)
        self._events: deque[Event] = deque()
        self._tags: dict[str, _Tag] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        """Draws from now on, in a thread of its own."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._draw)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Draws what is known by now and lets go of the terminal."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __call__(self, event: Event) -> None:
        """Takes the event in while drawing; the drawing thread does the rest."""
        if self._live is not None:
            self._events.append(event)

    def _draw(self) -> Table:
        # Only here, under the live display's lock, are the tags touched.
        while self._events:
            self._take(self._events.popleft())
        table = Table.grid(padding=(0, 1))
        for name, tag in self._tags.items():
            files = tag.files.values()
            total_bytes = sum(file.total_bytes for file in files)
            done_bytes = sum(file.done_bytes for file in files)
            table.add_row(*_row(name, _Bytes(total_bytes, done_bytes, tag.state)))
            for path, file in tag.files.items():
                table.add_row(*_row(f"  {path}", file))
        return table

    def _take(self, event: Event) -> None:
        tag = self._tag(event)
        match event:
            case Planned(_, path, nbytes):
                tag.files[path] = _Bytes(nbytes, 0, "staging")
            case Staged(_, path, nbytes):
                tag.files[path] = _Bytes(nbytes, 0, "writing")
            case Written(_, path, nbytes):
                tag.files[path] = _Bytes(nbytes, nbytes, "written")
            case Synced():
                tag.state = "publishing"
            case Published(report):
                tag.state = f"published after {report.total_s:.2f} s"
            case Failed():
                tag.state = f"failed: {event.error}"

    def _tag(self, event: Event) -> "_Tag":
        name = event.report.tag if isinstance(event, Published) else event.tag
        if name not in self._tags and len(self._tags) == _MAX_TAGS:
            del self._tags[next(iter(self._tags))]
        return self._tags.setdefault(name, _Tag())


@dataclass(slots=True)
class _Bytes:
    total_bytes: int
    done_bytes: int
    state: str


@dataclass(slots=True)
class _Tag:
    state: str = "saving"
    files: dict[str, _Bytes] = field(default_factory=dict[str, _Bytes])


def _row(name: str, row: _Bytes) -> tuple[Text, Bar, Text, Text]:
    return (
        Text(name),
        # rich draws an empty range as an endless one; no bytes are all there.
        Bar(row.total_bytes or 1, row.done_bytes, width=_BAR_COLUMNS),
        Text(format_bytes(row.total_bytes), justify="right"),
        Text(row.state),
    )
