"""`aiockpt.staging.cuda_driver`: what it asks of CUDA, told to bindings that note it.

Nothing here says that CUDA does what it is asked for; `tests/gpu` does.
"""

import os
import re
import subprocess
import sys
import textwrap
import types
from functools import partial
from pathlib import Path

import pytest
import torch

from aiockpt.staging import cuda_driver
from aiockpt.staging.cuda_driver import CudaDriver
from aiockpt.staging.driver import DeviceCopy, DeviceError
from gates import LIMIT_S

driver_api = pytest.importorskip("cuda.bindings.driver")

SUCCESS = driver_api.CUresult.CUDA_SUCCESS
INVALID = driver_api.CUresult.CUDA_ERROR_INVALID_VALUE


class Bindings:
    """The real enums and classes; functions that note their calls.

    Attributes:
        calls: Names and arguments, without those that make a context current.
        answers: What functions answer with, beyond success.
        current: Contexts on the thread's stack.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []
        self.answers: dict[str, tuple[object, ...]] = {
            "cuDeviceGet": (SUCCESS, 1),
            "cuDeviceGetAttribute": (SUCCESS, 1),
            "cuDevicePrimaryCtxRetain": (SUCCESS, "context"),
            "cuCtxGetStreamPriorityRange": (SUCCESS, 0, -5),
            "cuStreamCreateWithPriority": (SUCCESS, "stream"),
            "cuEventCreate": (SUCCESS, "event"),
            "cuDeviceGetPCIBusId": (SUCCESS, b"0000:AB:00.0\0\0\0"),
            "cuThreadExchangeStreamCaptureMode": (SUCCESS, "mode"),
            "cuGetErrorString": (SUCCESS, b"invalid argument"),
        }
        self.current: list[object] = []

    def __getattr__(self, name: str) -> object:
        real = getattr(driver_api, name)
        if not name.startswith("cu"):
            return real

        def call(*args: object) -> tuple[object, ...]:
            if name == "cuCtxPushCurrent":
                self.current.append(args[0])
            elif name == "cuCtxPopCurrent":
                self.current.pop()
            elif name not in ("cuThreadExchangeStreamCaptureMode", "cuGetErrorString"):
                self.calls.append((name, args))
            return self.answers.get(name, (SUCCESS,))

        return call

    def called(self, name: str) -> list[tuple[object, ...]]:
        return [args for called, args in self.calls if called == name]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    bindings = Bindings()
    monkeypatch.setattr(cuda_driver, "_probe", lambda: bindings)
    return bindings


def test_every_function_that_is_called_is_one_of_the_bindings():
    text = Path(cuda_driver.__file__).read_text()
    names = set(re.findall(r"\bapi\.(cu\w+)", text))
    assert len(names) > 15
    for name in names:
        assert callable(getattr(driver_api, name)), name


def test_a_copy_stream_waits_for_no_other_and_goes_last(api):
    assert CudaDriver().new_stream(1) == "stream"
    non_blocking = int(driver_api.CUstream_flags.CU_STREAM_NON_BLOCKING)
    assert api.called("cuStreamCreateWithPriority") == [(non_blocking, 0)]


def test_a_context_is_current_during_a_call_only_and_retained_once(api):
    driver = CudaDriver()
    driver.drain(1, "s")
    driver.drain(1, "s")
    assert api.called("cuDeviceGet") == [(1,)]
    assert api.called("cuDevicePrimaryCtxRetain") == [(1,)]
    assert api.current == []
    api.answers["cuStreamSynchronize"] = (INVALID,)
    with pytest.raises(
        DeviceError, match=r"CUDA_ERROR_INVALID_VALUE.*invalid argument"
    ):
        driver.drain(1, "s")
    assert api.current == []
    driver.close()
    assert len(api.called("cuDevicePrimaryCtxRelease")) == 1


def test_an_event_is_recorded_waited_for_and_ends_with_its_last_reference(api):
    driver = CudaDriver()
    event = driver.record(1, 0)
    driver.follow(1, "copies", event)
    driver.wait(1, event)
    assert api.called("cuEventRecord") == [("event", 0)]
    assert api.called("cuStreamWaitEvent") == [("copies", "event", 0)]
    assert api.called("cuEventSynchronize") == [("event",)]
    assert not api.called("cuEventDestroy")
    del event
    assert api.called("cuEventDestroy") == [("event",)]


COPIES = [DeviceCopy(100 + i, 200 + i, 10 + i) for i in range(5)]


def numbers(pointers: object) -> list[int]:
    return [int(pointer) for pointer in pointers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_to_host", [True, False])
def test_many_pieces_are_one_batch_behind_the_stream(api, is_to_host):
    driver = CudaDriver()
    copy = driver.to_host if is_to_host else driver.to_device
    copy(0, "s", COPIES, is_pinned=True)
    ((targets, sources, sizes, count, (attributes,), starts, one, stream),) = (
        api.called("cuMemcpyBatchAsync")
    )
    hosts, devices = [*range(100, 105)], [*range(200, 205)]
    assert numbers(targets) == (hosts if is_to_host else devices)
    assert numbers(sources) == (devices if is_to_host else hosts)
    assert (sizes, count, starts, one, stream) == ([10, 11, 12, 13, 14], 5, [0], 1, "s")
    order = driver_api.CUmemcpySrcAccessOrder
    assert attributes.srcAccessOrder == order.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert not api.called("cuMemcpyDtoHAsync")


@pytest.mark.parametrize(("num", "is_pinned"), [(3, True), (5, False)])
def test_few_pieces_and_pageable_memory_are_copied_one_by_one(api, num, is_pinned):
    driver = CudaDriver()
    driver.to_host(0, "s", COPIES[:num], is_pinned=is_pinned)
    assert not api.called("cuMemcpyBatchAsync")
    assert api.called("cuMemcpyDtoHAsync") == [
        (100 + i, 200 + i, 10 + i, "s") for i in range(num)
    ]
    driver.to_device(0, "s", COPIES[:num], is_pinned=is_pinned)
    assert api.called("cuMemcpyHtoDAsync") == [
        (200 + i, 100 + i, 10 + i, "s") for i in range(num)
    ]


def test_a_driver_without_batches_is_asked_for_one_once(api):
    api.answers["cuMemcpyBatchAsync"] = (INVALID,)
    driver = CudaDriver()
    driver.to_host(0, "s", COPIES, is_pinned=True)
    driver.to_host(0, "s", COPIES, is_pinned=True)
    assert len(api.called("cuMemcpyBatchAsync")) == 1
    assert len(api.called("cuMemcpyDtoHAsync")) == 10


def test_a_device_that_has_other_addresses_for_host_memory_is_given_no_batch(api):
    api.answers["cuDeviceGetAttribute"] = (SUCCESS, 0)
    driver = CudaDriver()
    driver.to_device(0, "s", COPIES, is_pinned=True)
    driver.to_device(0, "s", COPIES, is_pinned=True)
    assert not api.called("cuMemcpyBatchAsync")
    assert len(api.called("cuMemcpyHtoDAsync")) == 10
    asked = "CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"
    attribute = getattr(driver_api.CUdevice_attribute, asked)
    assert api.called("cuDeviceGetAttribute") == [(attribute, 1)]


def test_what_the_bindings_raise_by_themselves_is_a_device_s_error(api):
    def refuse(*_: object) -> None:
        raise RuntimeError('Function "cuStreamSynchronize" not found')

    api.cuStreamSynchronize = refuse
    with pytest.raises(DeviceError, match="RuntimeError: Function"):
        CudaDriver().drain(1, "s")
    assert api.current == []


def test_an_event_that_ends_while_a_context_is_looked_up_waits_for_nobody(api):
    driver = CudaDriver()
    event = driver.record(1, 0)
    with driver._lock:
        del event
    assert api.called("cuEventDestroy") == [("event",)]


def test_an_event_that_is_still_referred_to_ends_with_its_driver_once(api):
    driver = CudaDriver()
    event = driver.record(1, 0)
    driver.close()
    assert api.called("cuEventDestroy") == [("event",)]
    with pytest.raises(DeviceError, match="closed"):
        driver.follow(1, "theirs", event)
    assert not api.called("cuStreamWaitEvent")
    del event
    assert len(api.called("cuEventDestroy")) == 1
    assert len(api.called("cuDevicePrimaryCtxRetain")) == 1


def test_the_default_stream_is_torch_s(monkeypatch):
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    assert CudaDriver().current_stream(0) == int(driver_api.CU_STREAM_LEGACY)


def test_memory_is_pinned_for_all_devices_and_unpinned_by_its_address(api):
    driver = CudaDriver()
    driver.pin(0, 4096, 8192)
    driver.unpin(0, 4096)
    portable = driver_api.CU_MEMHOSTREGISTER_PORTABLE
    assert api.called("cuMemHostRegister") == [(4096, 8192, portable)]
    assert api.called("cuMemHostUnregister") == [(4096,)]


def test_memory_is_first_touched_by_processors_next_to_the_device(tmp_path):
    before = os.sched_getaffinity(0)
    one = min(before)
    (tmp_path / "0000:ab:00.0").mkdir()
    (tmp_path / "0000:ab:00.0" / "local_cpulist").write_text(f"{one}-{one},9999\n")
    with cuda_driver._next_to("0000:ab:00.0", tmp_path):
        assert os.sched_getaffinity(0) == {one}
    assert os.sched_getaffinity(0) == before
    for unknown in ("", "0000:00:00.0"):
        with cuda_driver._next_to(unknown, tmp_path):
            assert os.sched_getaffinity(0) == before


def test_the_thread_that_pins_is_next_to_the_device(api, tmp_path, monkeypatch):
    (tmp_path / "0000:ab:00.0").mkdir()
    one = max(os.sched_getaffinity(0))
    (tmp_path / "0000:ab:00.0" / "local_cpulist").write_text(f"{one}\n")
    monkeypatch.setattr(
        cuda_driver, "_next_to", partial(cuda_driver._next_to, root=tmp_path)
    )
    found: list[set[int]] = []

    def register(*_: object) -> tuple[object]:
        found.append(os.sched_getaffinity(0))
        return (SUCCESS,)

    monkeypatch.setattr(api, "cuMemHostRegister", register, raising=False)
    CudaDriver().pin(0, 4096, 8192)
    assert found == [{one}]


@pytest.mark.parametrize(
    "error", [ImportError("no module"), RuntimeError("no library")]
)
def test_bindings_that_lead_nowhere_are_tried_once_and_say_why(monkeypatch, error):
    tries: list[int] = []

    def probe() -> object:
        tries.append(1)
        raise error

    monkeypatch.setattr(cuda_driver, "_probe", probe)
    driver = CudaDriver()
    for _ in range(2):
        with pytest.raises(DeviceError, match=f"cuda-python cannot be used.*{error}"):
            driver.check_usable()
    assert len(tries) == 1
    driver.close()


def test_a_driver_that_does_not_start_is_told(monkeypatch):
    no_device = driver_api.CUresult.CUDA_ERROR_NO_DEVICE
    module = types.SimpleNamespace(cuInit=lambda _: (no_device,))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
    monkeypatch.setattr(sys.modules["cuda.bindings"], "driver", module, raising=False)
    with pytest.raises(DeviceError, match="CUDA_ERROR_NO_DEVICE"):
        CudaDriver().check_usable()


def test_without_the_bindings_all_that_is_on_the_host_is_saved_and_loaded(tmp_path):
    program = f"""
        import sys

        class Missing:
            def find_spec(self, name, *_):
                if name.partition(".")[0] == "cuda":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Missing())
        import torch
        from aiockpt.sync import CheckpointEngine
        from aiockpt.staging.cuda_driver import CudaDriver, DeviceError

        with CheckpointEngine({str(tmp_path)!r}) as engine:
            engine.create("a")
            engine.save({{"weight": torch.ones(3)}}, "model.pt")
            engine.commit("a")
            assert engine.load("model.pt")["weight"].sum() == 3
        try:
            CudaDriver().check_usable()
        except DeviceError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert "cuda-python cannot be used here" in done.stdout


def test_where_cuda_was_never_used_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(cuda_driver, "_probe", pytest.fail)
    driver = CudaDriver()
    tensor = torch.zeros(3)
    assert driver.devices_of([tensor], [tensor.untyped_storage()]) == set()
    assert driver.device_of(tensor) is None
    assert driver.named("cpu") is None
