"""CUDA is begun before anything is counted: it keeps threads and files for itself."""

import threading

import pytest

_NUM_EVENTS = 256
_NUM_PIECES = 8


@pytest.fixture(scope="session", autouse=True)
def cuda_has_been_used() -> None:
    """Every device has a context, and has done once what the engine asks of it."""
    import torch

    if not torch.cuda.is_available():
        return
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            on_device = torch.ones(1 << 20, device="cuda")
            on_host = torch.empty(1 << 20, pin_memory=True)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                on_host.copy_(on_device, non_blocking=True)
            stream.synchronize()
            torch.optim.AdamW([torch.nn.Parameter(on_device)], fused=True)
            _drive(number, on_device)


def _drive(number: int, on_device: object) -> None:
    """Pins, copies in a batch, records and waits, as the engine does."""
    import torch

    from aiockpt.staging.cuda_driver import CudaDriver
    from aiockpt.staging.driver import DeviceCopy

    assert isinstance(on_device, torch.Tensor)
    driver = CudaDriver()
    memory = torch.empty(on_device.nbytes, dtype=torch.uint8)
    driver.pin(number, memory.data_ptr(), memory.nbytes)
    stream = driver.new_stream(number)
    length = memory.nbytes // _NUM_PIECES
    copies = [
        DeviceCopy(memory.data_ptr() + start, on_device.data_ptr() + start, length)
        for start in range(0, memory.nbytes, length)
    ]
    driver.to_host(number, stream, copies, is_pinned=True)
    events = [driver.record(number, stream) for _ in range(_NUM_EVENTS)]
    waiting = threading.Thread(target=driver.wait, args=(number, events[-1]))
    waiting.start()
    waiting.join()
    events.clear()
    driver.unpin(number, memory.data_ptr())
    driver.end_stream(number, stream)
    driver.close()
