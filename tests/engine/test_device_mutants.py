"""aiockpt, broken on purpose where it deals with devices: each break must be seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import device_load_scenarios as loads
import device_scenarios as scenarios
from aiockpt import CheckpointError, runtime, saver
from aiockpt.capture import capture
from aiockpt.file_save import FileSave
from aiockpt.guard import StagingGate
from aiockpt.loading.bulk import BulkRead
from aiockpt.loading.reader import Reader
from aiockpt.loading.torch_loading import TorchLoading
from aiockpt.staging.device import DeviceStager
from aiockpt.staging.devices import Devices, InFlight
from aiockpt.staging.pinning import PinnedMemory
from aiockpt.testing.simulated_device import SimulatedDevices
from device_scenarios import Scenario, run

Patch = pytest.MonkeyPatch
EARLY = {"is_lazy": False, "is_eager": False}
"""Copies run at once, and the caller's kernels as late as they may."""
LATE = {"is_lazy": True, "is_eager": True}
"""The reverse."""


def copies_do_not_wait_for_the_caller(patch: Patch) -> None:
    def stream(stager: Any, device: int) -> Any:
        return stager._devices.stream(device, "save")

    patch.setattr(DeviceStager, "_stream", stream)


def copies_wait_for_the_caller_on_one_device_only(patch: Patch) -> None:
    stream = DeviceStager._stream

    def of_one(stager: Any, device: int) -> Any:
        if device != min(stager._starts):
            return stager._devices.stream(device, "save")
        return stream(stager, device)

    patch.setattr(DeviceStager, "_stream", of_one)


def one_device_is_asked_for_all_of_them(patch: Patch) -> None:
    current_stream = SimulatedDevices.current_stream
    patch.setattr(
        SimulatedDevices,
        "current_stream",
        lambda devices, _: current_stream(devices, 0),
    )


def the_caller_waits_for_copies_of_one_device_only(patch: Patch) -> None:
    follow = DeviceStager.follow

    def of_one(stager: Any) -> bool:
        stager._ends.pop(1, None)
        return follow(stager)

    patch.setattr(DeviceStager, "follow", of_one)


def the_default_stream_is_taken_for_the_current_one(patch: Patch) -> None:
    patch.setattr(
        SimulatedDevices,
        "current_stream",
        lambda devices, device: devices._defaults[device],
    )


def the_caller_does_not_wait_for_copies(patch: Patch) -> None:
    patch.setattr(DeviceStager, "follow", lambda _: True)


def the_caller_is_let_go_with_the_first_chunk(patch: Patch) -> None:
    init = saver._Transfer.__init__

    def begin(transfer: Any, *args: Any) -> None:
        init(transfer, *args)
        transfer._num_unbegun = 1

    patch.setattr(saver._Transfer, "__init__", begin)


def chunks_are_filled_once_copies_are_enqueued(patch: Patch) -> None:
    async def ended(in_flight: Any) -> None:
        in_flight._at_end()

    patch.setattr(InFlight, "ended", ended)


def a_cancelled_save_leaves_its_copies_alone(patch: Patch) -> None:
    patch.setattr(InFlight, "ended", InFlight._end)


def sources_are_dropped_once_copies_are_enqueued(patch: Patch) -> None:
    let_go_on = saver._Transfer._let_go_on

    async def drop(transfer: Any) -> None:
        await let_go_on(transfer)
        transfer._plan.sources.clear()
        transfer._save.capture.tensors = []
        transfer._save.capture.tree = None

    patch.setattr(saver._Transfer, "_let_go_on", drop)
    patch.setattr(FileSave, "note_changes", lambda _: None)
    patch.setattr(FileSave, "follow", lambda save: save.stager.follow())


def changes_are_looked_for_only_once(patch: Patch) -> None:
    note, noted = FileSave.note_changes, set[int]()

    def note_once(save: FileSave) -> None:
        if id(save) not in noted:
            noted.add(id(save))
            note(save)

    patch.setattr(FileSave, "note_changes", note_once)


def the_guard_forgives_what_came_before_it(patch: Patch) -> None:
    def follow(save: Any) -> bool:
        save.is_followed = True
        return bool(save.stager.follow())

    patch.setattr(FileSave, "follow", follow)


def the_guard_lets_everyone_through(patch: Patch) -> None:
    patch.setattr(StagingGate, "_wait_for", lambda *_, **__: None)
    patch.setattr(FileSave, "follow", lambda _: True)


def tensors_are_filled_under_those_who_use_them(patch: Patch) -> None:
    patch.setattr(Reader, "_settle", lambda *_: None)


def blocks_are_read_when_the_one_before_has_been_copied(patch: Patch) -> None:
    run = BulkRead.run

    async def in_turn(read: Any, ring: Any, workers: Any, _: int) -> None:
        await run(read, ring, workers, 1)

    patch.setattr(BulkRead, "run", in_turn)
    # What never happens is not waited for.
    patch.setattr(scenarios, "limit_s", 1.0)


def strided_tensors_are_made_contiguous(patch: Patch) -> None:
    def captured(state: dict[str, torch.Tensor]) -> Any:
        return capture({key: tensor.contiguous() for key, tensor in state.items()})

    patch.setattr(runtime, "capture", captured)


def mappings_of_devices_are_left_to_torch(patch: Patch) -> None:
    landing = TorchLoading._landing

    def for_one_device(loading: Any, names: Any, pickle: Any) -> Any:
        if not isinstance(loading.placement.map_location, str | torch.device):
            names = ()
        return landing(loading, names, pickle)

    patch.setattr(TorchLoading, "_landing", for_one_device)


def memory_stays_pinned(patch: Patch) -> None:
    patch.setattr(PinnedMemory, "close", lambda _: None)


def streams_stay(patch: Patch) -> None:
    patch.setattr(Devices, "close", lambda devices: devices.memory.close())


def memory_is_taken_for_pinned(patch: Patch) -> None:
    async def ready(*_: object) -> bool:
        return True

    patch.setattr(PinnedMemory, "ready", ready)


def it(scenario: Scenario, timing: dict[str, bool]) -> tuple[Scenario, dict[str, bool]]:
    return scenario, timing


CAUGHT: dict[Callable[[Patch], None], tuple[Scenario, dict[str, bool]]] = {
    copies_do_not_wait_for_the_caller: it(
        scenarios.what_was_enqueued_before_a_save_is_in_it, EARLY
    ),
    copies_wait_for_the_caller_on_one_device_only: it(
        scenarios.every_device_has_an_order_of_its_own, EARLY
    ),
    one_device_is_asked_for_all_of_them: it(
        scenarios.every_device_has_an_order_of_its_own, EARLY
    ),
    the_caller_waits_for_copies_of_one_device_only: it(
        scenarios.every_device_has_an_order_of_its_own, LATE
    ),
    the_default_stream_is_taken_for_the_current_one: it(
        scenarios.what_was_enqueued_before_a_save_is_in_it, EARLY
    ),
    the_caller_does_not_wait_for_copies: it(
        scenarios.a_step_after_a_save_is_not_in_it, LATE
    ),
    the_caller_is_let_go_with_the_first_chunk: it(
        scenarios.a_state_larger_than_the_ring_holds_a_step_as_long_as_need_be, LATE
    ),
    chunks_are_filled_once_copies_are_enqueued: it(
        scenarios.mixed_states_come_from_where_they_are, LATE
    ),
    a_cancelled_save_leaves_its_copies_alone: it(
        scenarios.an_aborted_tag_keeps_its_chunks_until_devices_have_done_with_them,
        LATE,
    ),
    sources_are_dropped_once_copies_are_enqueued: it(
        scenarios.after_staged_everything_may_be_changed_and_dropped, LATE
    ),
    changes_are_looked_for_only_once: it(
        scenarios.a_change_that_nobody_ordered_is_reported, LATE
    ),
    the_guard_forgives_what_came_before_it: it(
        scenarios.a_change_between_begun_and_staged_is_reported, LATE
    ),
    the_guard_lets_everyone_through: it(
        scenarios.a_state_larger_than_the_ring_holds_a_step_as_long_as_need_be, LATE
    ),
    tensors_are_filled_under_those_who_use_them: it(
        loads.a_load_fills_tensors_behind_what_uses_them, EARLY
    ),
    blocks_are_read_when_the_one_before_has_been_copied: it(
        loads.a_load_reads_on_while_a_device_copies, LATE
    ),
    mappings_of_devices_are_left_to_torch: it(
        loads.a_load_goes_where_map_location_says, LATE
    ),
    strided_tensors_are_made_contiguous: it(
        scenarios.nothing_is_kept_after_staging, LATE
    ),
    memory_stays_pinned: it(scenarios.mixed_states_come_from_where_they_are, LATE),
    streams_stay: it(scenarios.mixed_states_come_from_where_they_are, LATE),
    memory_is_taken_for_pinned: it(
        scenarios.mixed_states_come_from_where_they_are, LATE
    ),
}


@pytest.mark.parametrize("mutant", CAUGHT, ids=lambda mutant: mutant.__name__)
@pytest.mark.leaks("what is broken leaves behind what it will")
async def test_what_is_broken_is_caught(mutant, root, monkeypatch):
    scenario, timing = CAUGHT[mutant]
    mutant(monkeypatch)
    # What the scenario checks; or the engine itself notices, and says so. (What
    # `pytest.raises` reports is neither an Exception nor an AssertionError.)
    with pytest.raises(
        (AssertionError, TimeoutError, CheckpointError, pytest.fail.Exception)
    ):
        await run(scenario, root, **timing)


async def test_a_load_is_not_over_before_its_copies(root, monkeypatch):
    scenario = loads.a_load_fills_tensors_behind_what_uses_them
    chunks_are_filled_once_copies_are_enqueued(monkeypatch)
    with pytest.raises(AssertionError):
        await run(scenario, root, **LATE)
