"""CUDA is begun before anything is counted: it keeps threads and files for itself."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def cuda_has_been_used() -> None:
    """Every device has a context, and has copied, pinned and waited once."""
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
