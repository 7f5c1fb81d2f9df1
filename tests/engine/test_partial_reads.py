"""How many bytes of a file a partial load asks the kernel for."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from aiockpt import sync
from gates import LIMIT_S

MIB = 1 << 20
NUM_TENSORS = 300
# One tensor of 1 MiB + 4 KiB; the whole file has 300 of them.
NUM_ELEMENTS = (MIB + 4096) // 4
DIRECTORY_BYTES = NUM_TENSORS * 80


@pytest.fixture
def path(root):
    tensor = torch.rand(NUM_ELEMENTS)
    path = root.parent / "large.pt"
    torch.save({f"layers.{n}": tensor + n for n in range(NUM_TENSORS)}, path)
    return path


def limit(num_tensors):
    return num_tensors * NUM_ELEMENTS * 4 + MIB + DIRECTORY_BYTES


def num_bytes_read() -> int:
    """Bytes that this process has asked the kernel to read."""
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])


@pytest.mark.parametrize(
    ("keys", "count"), [(["layers.150"], 1), (["layers.7", "layers.1?0"], 11)]
)
def test_a_partial_load_reads_its_tensors_and_little_else(path, keys, count):
    before = num_bytes_read()
    assert len(sync.load(path, keys=keys)) == count
    assert num_bytes_read() - before <= limit(count)


# Nothing else in the process reads by these.
STRACE = ["strace", "-f", "-qq", "-e", "trace=preadv,preadv2", "-o"]
PROGRAM = """
import sys
from aiockpt import sync
sync.load(sys.argv[1], keys=["layers.150"])
"""


@pytest.mark.slow
def test_the_kernel_sees_a_partial_load_read_one_tensor(path, tmp_path):
    assert shutil.which("strace"), "strace is missing: apt-get install strace"
    output = tmp_path / "strace"
    program = [sys.executable, "-c", PROGRAM, str(path)]
    subprocess.run([*STRACE, str(output), *program], check=True, timeout=LIMIT_S)
    lines = output.read_text().splitlines()
    counts = [
        int(found[1]) for line in lines if (found := re.search(r"= (\d+)$", line))
    ]
    assert sum(counts) >= NUM_ELEMENTS * 4
    assert sum(counts) <= limit(1)
