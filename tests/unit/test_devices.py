"""Copies in flight, and where "cuda" is, without a device."""

from types import SimpleNamespace
from typing import Any

import pytest

from aiockpt.errors import StagingError
from aiockpt.loading import placing
from aiockpt.staging.devices import InFlight
from aiockpt.staging.driver import DeviceError


class NoThreads:
    """A pool for which the system has no thread."""

    def submit(self, *_: object) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("refuses", [False, True])
async def test_copies_end_before_their_chunk_is_given_back_also_without_a_thread(
    refuses,
):
    log: list[str] = []

    def drain(*_: object) -> None:
        log.append("drained")
        if refuses:
            raise DeviceError("gone")

    driver = SimpleNamespace(
        to_host=lambda *_, **__: log.append("copied"),
        record=lambda *_: "event",
        wait=lambda *_: None,
        drain=drain,
    )
    devices: Any = SimpleNamespace(driver=driver, waiter=lambda _: NoThreads())
    in_flight = InFlight(devices, at_end=lambda: log.append("given back"))
    in_flight.copy(0, "stream", [], is_to_host=True, is_pinned=True)
    with pytest.raises(StagingError, match="gone" if refuses else "new thread"):
        await in_flight.ended()
    assert log == ["copied", "drained", "given back"]


def test_cuda_is_the_device_of_the_thread_that_asks_in_every_form(monkeypatch):
    monkeypatch.setattr(placing, "current_device", lambda: 1)
    assert placing.resolved("cuda") == "cuda:1"
    wanted = {"cuda:0": "cuda", "cpu": "cpu", "cuda:1": "cuda:0"}
    found = {"cuda:0": "cuda:1", "cpu": "cpu", "cuda:1": "cuda:0"}
    assert placing.resolved(wanted) == found
