"""Saves and loads with the real `cuda.bindings`, and a driver that has no device.

`test_cuda_driver.py` looks at what is asked of the bindings; here they ask on, of a
library (`libcuda.c`) that keeps count and does copies at once. What a device does is for
`tests/gpu`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

pytest.importorskip("cuda.bindings.driver")
COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver of its own"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, under the name by which the bindings look for it."""
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    flags = ("-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libcuda.so.1")
    command = [f"{COMPILER}", *flags, "-o", str(path), str(HERE / "libcuda.c")]
    subprocess.run([*command, "-lpthread"], check=True, timeout=60)
    return path


def run(library: Path, *scenario: str, **environment: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, str(HERE / "child.py"), *scenario],
        # Before all others: whoever looks for that name finds what is there.
        env={**os.environ, "LD_PRELOAD": str(library), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    # Whatever happened, nothing is left, and nothing was asked that no driver takes.
    assert told["fault"] == ""
    ends = ("current", "streams", "events", "pinned", "contexts")
    assert {name: told[name] for name in ends} == dict.fromkeys(ends, 0)
    return told


def test_a_save_and_a_load_go_through_the_bindings_and_leave_nothing(library: Path):
    from cuda.bindings import driver

    told = run(library, "both ways", "0", "1")
    assert told["warned"] == []
    assert told["stream_flags"] == int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
    # The least, of a range from 0 to -5.
    assert told["stream_priority"] == 0
    sleeps = int(driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC)
    assert told["event_flags"] & sleeps
    assert told["pin_flags"] == int(driver.CU_MEMHOSTREGISTER_PORTABLE)
    order = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    assert told["order"] == int(order)
    # Of 3 000 small tensors, each way.
    assert told["batched"] >= 6000
    assert told["batches"] < 60
    assert told["ever_0"] == told["ever_1"] == 1


def test_no_context_is_opened_on_a_device_that_has_no_tensor(library: Path):
    told = run(library, "both ways", "1")
    assert (told["ever_0"], told["ever_1"]) == (0, 1)


def test_a_driver_without_batches_copies_one_by_one(library: Path):
    told = run(library, "both ways", "0", PRETENDED_WITHOUT_BATCHES="1")
    assert told["batches"] == 0
    assert told["copies"] >= 6000


def test_memory_that_may_not_be_pinned_is_warned_of_once_and_used(library: Path):
    told = run(library, "save", "cuMemHostRegister_v2")
    assert told["raised"] == ""
    (warning,) = told["warned"]
    assert "out of memory" in warning


def test_a_batch_that_is_refused_is_copied_one_by_one(library: Path):
    told = run(library, "save", "cuMemcpyBatchAsync_v2")
    assert told["raised"] == ""
    assert told["batches"] == 0


@pytest.mark.parametrize(
    "function",
    [
        "cuCtxGetStreamPriorityRange",
        "cuStreamCreateWithPriority",
        "cuStreamWaitEvent",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuMemcpyDtoHAsync_v2",
        # And what waits, where there is no event to wait for, refuses as well.
        "cuEventRecord cuStreamSynchronize",
    ],
)
def test_a_call_that_fails_fails_the_save_with_its_words_and_no_other(
    library: Path, function: str
):
    told = run(library, "save", *function.split())
    assert "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in told["raised"]


@pytest.mark.parametrize(
    "function",
    [
        "cuCtxSynchronize",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventRecord cuStreamSynchronize",
        "cuEventSynchronize",
        "cuMemcpyHtoDAsync_v2",
    ],
)
def test_a_call_that_fails_fails_the_load_with_its_words_and_no_other(
    library: Path, function: str
):
    told = run(library, "load", *function.split())
    assert "CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in told["raised"]


def test_a_driver_that_does_not_start_is_told(library: Path):
    told = run(library, "save", "cuInit")
    assert "cuInit: CUDA_ERROR_OUT_OF_MEMORY" in told["raised"]
