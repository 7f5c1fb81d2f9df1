"""The observers that ship: what is logged at which level, and what is drawn."""

import io
import logging

import pytest
from rich.console import Console

from aiockpt import events
from aiockpt.observers import LoggingObserver, ProgressBar

REPORT = events.CommitReport(
    tag="step-1",
    nbytes=3_000_000,
    num_files=2,
    plan_s=0.001,
    stage_s=0.1,
    write_s=0.2,
    sync_s=0.1,
    publish_s=0.1,
    total_s=0.5,
    stall_s=0.0021,
    peak_ring_bytes=1 << 20,
)
LIFE = [
    events.Planned("step-1", "model.pt", 2_000_000, 4, 0.001),
    events.Staged("step-1", "model.pt", 2_000_000, 0.1),
    events.Written("step-1", "model.pt", 2_000_000, 0xABCD, True, 0.2),
    events.Synced("step-1", 1, 2_000_000, 0.1),
]


@pytest.mark.parametrize("event", LIFE, ids=lambda event: type(event).__name__)
def test_what_happens_to_a_file_is_logged_at_debug(event, caplog):
    with caplog.at_level(logging.DEBUG, logger="aiockpt"):
        LoggingObserver()(event)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("aiockpt", logging.DEBUG)
    assert "step-1" in record.message
    assert "2000000 bytes" in record.message


def test_a_published_tag_is_logged_at_info_with_size_time_and_throughput(caplog):
    with caplog.at_level(logging.INFO, logger="aiockpt"):
        for event in [*LIFE, events.Published(REPORT)]:
            LoggingObserver()(event)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.message == (
        "step-1 published: 2 files, 3000000 bytes, 0.500 s, 6.0 MB/s, "
        "held training 2.1 ms"
    )


@pytest.mark.parametrize(
    ("path", "place"), [("model.pt", "step-1/model.pt"), (None, "step-1")]
)
def test_a_failure_is_logged_at_error_with_its_place_and_cause(path, place, caplog):
    LoggingObserver()(events.Failed("step-1", path, OSError("disk on fire")))
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message == f"{place} failed: OSError: disk on fire"
    assert record.exc_info is None


def test_the_logger_can_be_chosen(caplog):
    LoggingObserver(logging.getLogger("mine"))(events.Failed("a", None, OSError()))
    assert caplog.records[0].name == "mine"


def terminal():
    return Console(
        file=io.StringIO(), force_terminal=True, width=100, color_system=None
    )


def drawn(console, *happened):
    with ProgressBar(console) as progress:
        for event in happened:
            progress(event)
    # The last frame is drawn on the way out, whatever the refresh thread did.
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("num_events", "state"),
    [(1, "staging"), (2, "writing"), (3, "written"), (4, "publishing")],
)
def test_the_bar_says_how_far_a_file_is(num_events, state):
    text = drawn(terminal(), *LIFE[:num_events])
    assert state in text
    assert "model.pt" in text
    assert "2.0 MB" in text


def test_the_bar_says_that_a_tag_is_published():
    text = drawn(terminal(), *LIFE, events.Published(REPORT))
    assert "published after 0.50 s" in text


def test_the_bar_says_why_a_tag_failed():
    text = drawn(terminal(), LIFE[0], events.Failed("step-1", None, OSError("full")))
    assert "failed: full" in text


def test_only_the_newest_tags_stay_in_sight():
    tags = [f"step-{number}" for number in range(6)]
    console = terminal()
    # Held, so that no frame is drawn with only the first of them.
    with ProgressBar(console) as progress, progress._live._lock:
        for tag in tags:
            progress(events.Synced(tag, 1, 1, 0.1))
    text = console.file.getvalue()
    assert [tag for tag in tags if tag in text] == tags[-4:]


def test_names_and_errors_are_shown_as_they_are_and_not_as_markup():
    text = drawn(terminal(), events.Failed("[red]tag", None, OSError("[/nope]")))
    assert "[red]tag" in text
    assert "failed: [/nope]" in text


def test_nothing_is_drawn_off_a_terminal():
    console = Console(file=io.StringIO())
    assert drawn(console, *LIFE) == ""


def test_outside_its_context_the_bar_ignores_events_and_keeps_none():
    console = terminal()
    progress = ProgressBar(console)
    progress(LIFE[0])
    with progress:
        pass
    progress(LIFE[0])
    assert "model.pt" not in console.file.getvalue()
