"""What the demonstration shows on a terminal and elsewhere."""

import io

import pytest
from rich.console import Console

from aiockpt.demo.display import Lines, LivePanel, display
from aiockpt.demo.trainer import Saved, Started, Stepped

STARTED = Started(
    step=20, steps=45, num_parameters=1_900_000, resumed_from="s-20", fatal_tag="s-40"
)
SAVED = Saved(
    published="s-30",
    nbytes=20_000_000,
    stall_s=0.0031,
    total_s=0.1,
    peak_ring_bytes=8_000_000,
    ring_bytes=16_000_000,
)


def stepped(step):
    return Stepped(step=step, loss=5 - step / 45, elapsed_s=0.08)


def console(*, is_terminal):
    return Console(
        file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None
    )


def shown(show):
    with show as emit:
        emit(STARTED)
        for step in range(21, 46):
            emit(stepped(step))
            if step == 31:
                emit(SAVED)


def test_off_a_terminal_there_is_a_line_for_the_start_ten_steps_and_each_save():
    output = console(is_terminal=False)
    shown(display(output, "training"))
    lines = output.file.getvalue().splitlines()
    assert lines[0] == "training"
    assert lines[1] == (
        "  resumed from s-20, 1.9 M parameters; "
        "will be killed by SIGKILL in the save of s-40"
    )
    assert [line.split()[1] for line in lines if " step " in line] == [
        "30/45",
        "40/45",
        "45/45",
    ]
    assert (
        "  s-30 published: 20.0 MB, training held 3.1 ms, durable after 100 ms "
        "(200.0 MB/s), ring peak 8.0 MB of 16.0 MB"
    ) in lines


def test_on_a_terminal_there_is_a_panel_with_step_loss_save_and_ring():
    output = console(is_terminal=True)
    shown(display(output, "training"))
    text = output.file.getvalue()
    for part in ("training", "45/45", "80 ms", "4.0000", "s-30 published", "3.1 ms"):
        assert part in text


def test_a_panel_can_be_left_before_anything_has_happened():
    with display(console(is_terminal=True), "training"):
        pass


@pytest.mark.parametrize(
    ("is_terminal", "is_doomed", "kind"),
    [(True, False, LivePanel), (False, False, Lines), (True, True, Lines)],
)
def test_a_process_that_will_be_killed_does_not_take_the_cursor(
    is_terminal, is_doomed, kind
):
    output = console(is_terminal=is_terminal)
    assert type(display(output, "training", is_doomed=is_doomed)) is kind
