"""No change of a published checkpoint, however small, is ever handed out as data."""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.cli.places import opened
from aiockpt.errors import CorruptCheckpointError
from aiockpt.loader import RecordInfo, inspect_file
from aiockpt.sync import CheckpointEngine
from equality import assert_same_state
from gates import RING_8_MIB

BLOCK = 4096
TAG = "step-2"
CONTAINERS = ["model.pt", "model.safetensors"]
MANIFEST = ".aiockpt/manifest.json"
# Together 2000.
NUM_FLIPS = {"model.pt": 900, "model.safetensors": 900, MANIFEST: 200}


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """A few hundred KiB, all of them other with another seed, all of them needed."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"layers.{index}.weight": torch.randn(size, generator=generator)
        for index, size in enumerate([30_000, 1, 20_000, 513, 10_000])
    }
    state["mask"] = torch.randint(0, 2, (777,), generator=generator).bool()
    return state


class Published:
    """A root with tags of equal length, and one engine that loads from it."""

    def __init__(self, root: Path, engine: CheckpointEngine) -> None:
        self.root = root
        self.engine = engine
        self.stale: dict[str, bytes] = {}
        self.publish("step-1", seed=1)
        self.publish(TAG, seed=2)
        for name in CONTAINERS:
            self.stale[name] = self.path(name).read_bytes()
        self.publish(TAG, seed=3, overwrite=True)
        # The threads that load start with the first load, and end with the engine.
        for name in CONTAINERS:
            self.engine.load(name, tag=TAG)

    def publish(self, tag: str, seed: int, *, overwrite: bool = False) -> None:
        self.engine.create(tag, overwrite=overwrite)
        for name in CONTAINERS:
            self.engine.save(state_of(seed), name, tag=tag)
        self.engine.commit(tag)

    def path(self, name: str, tag: str = TAG) -> Path:
        return self.root / tag / name

    def refusal(self, name: str, changed: str) -> CorruptCheckpointError:
        """The error that loading `name` raises; it names the changed file."""
        with pytest.raises(CorruptCheckpointError) as caught:
            self.engine.load(name, tag=TAG, verify=True)
        assert str(self.path(changed)) in str(caught.value)
        return caught.value

    def records(self, name: str) -> list[RecordInfo]:
        with opened(self.root, f"{TAG}/{name}") as file:
            return list(inspect_file(file).records)

    @contextlib.contextmanager
    def content(self, name: str, data: bytes) -> Iterator[None]:
        """The file with other bytes, in place, until the block ends."""
        path = self.path(name)
        good = path.read_bytes()
        assert data != good
        try:
            overwrite(path, data)
            yield
        finally:
            overwrite(path, good)


def overwrite(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    with CheckpointEngine(root, RING_8_MIB) as engine:
        yield Published(root, engine)


@pytest.fixture(autouse=True)
def the_checkpoint_is_whole_again(published):
    yield
    for name in CONTAINERS:
        assert_same_state(published.engine.load(name, tag=TAG), state_of(3))


def offsets(
    choose: random.Random, num_bytes: int, data: list[range], count: int
) -> list[int]:
    """Half from the whole file, half from what is no tensor's data, if there is any."""
    anywhere = [choose.randrange(num_bytes) for _ in range(count // 2)]
    between = sorted(set(range(num_bytes)).difference(*data))
    return anywhere + choose.choices(between, k=count - len(anywhere))


def flipped(path: Path, offset: int, bit: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        (byte,) = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([byte ^ 1 << bit]), offset)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_flipped_bit_of_a_file_is_found(name, published):
    path = published.path(name)
    tensors = [r for r in published.records(name) if r.name not in SMALL_RECORDS]
    spans = {range(r.offset, r.offset + r.nbytes): r for r in tensors}
    choose = random.Random(f"flips of {name}")
    num_bytes = path.stat().st_size
    num_in_data = 0
    for offset in offsets(choose, num_bytes, list(spans), NUM_FLIPS[name]):
        bit = choose.randrange(8)
        flipped(path, offset, bit)
        error = published.refusal(name, name)
        flipped(path, offset, bit)
        record = next((r for span, r in spans.items() if offset in span), None)
        if record is not None and record.crc32 is not None:
            # The torch container has a checksum for each tensor.
            assert error.key in state_of(3)
            assert error.offset == record.offset
        num_in_data += record is not None
    assert 0.3 < num_in_data / NUM_FLIPS[name] < 0.7


SMALL_RECORDS = {
    "data.pkl",
    "version",
    "byteorder",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
}


def test_every_flipped_bit_of_a_manifest_is_found(published):
    path = published.path(MANIFEST)
    choose = random.Random("flips of the manifest")
    for _ in range(NUM_FLIPS[MANIFEST]):
        offset, bit = choose.randrange(path.stat().st_size), choose.randrange(8)
        flipped(path, offset, bit)
        published.refusal(choose.choice(CONTAINERS), MANIFEST)
        flipped(path, offset, bit)


@pytest.mark.parametrize("name", [*CONTAINERS, MANIFEST])
def test_every_other_length_is_found(name, published):
    good = published.path(name).read_bytes()
    edges = range(0, len(good) + 2 * BLOCK, BLOCK)
    lengths = {edge + delta for edge in (*edges, len(good)) for delta in (-1, 0, 1)}
    for nbytes in sorted(lengths - {-1, len(good)}):
        data = good[:nbytes].ljust(nbytes, b"\0")
        with published.content(name, data):
            published.refusal(CONTAINERS[0] if name == MANIFEST else name, name)


def zeroed(data: bytes, start: int) -> bytes:
    return (
        data[:start] + bytes(len(data[start : start + BLOCK])) + data[start + BLOCK :]
    )


def swapped(data: bytes, one: int, other: int) -> bytes:
    low, high = sorted((one, other))
    parts = (data[:low], data[high : high + BLOCK], data[low + BLOCK : high])
    return b"".join((*parts, data[low : low + BLOCK], data[high + BLOCK :]))


def damages(good: bytes) -> list[bytes]:
    """Each block zeroed, and some pairs of blocks swapped."""
    choose = random.Random("damages")
    starts = range(0, len(good) - BLOCK, BLOCK)
    pairs = [choose.sample(starts, 2) for _ in range(60)]
    return [
        *(zeroed(good, start) for start in range(0, len(good), BLOCK)),
        *(swapped(good, *pair) for pair in pairs),
    ]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_block_that_is_lost_or_in_another_place_is_found(name, published):
    for data in damages(published.path(name).read_bytes()):
        with published.content(name, data):
            published.refusal(name, name)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(
            lambda p, name: p.path(name, "step-1").read_bytes(), id="other tag"
        ),
        pytest.param(lambda p, name: p.stale[name], id="before the overwrite"),
    ],
)
def test_a_sound_file_of_another_time_is_found(
    name, source: Callable[[Published, str], bytes], published
):
    data = source(published, name)
    assert len(data) == published.path(name).stat().st_size
    with published.content(name, data):
        published.refusal(name, name)


def test_the_files_of_the_containers_changed_about_are_found(published):
    # Each is sound, and neither is what the manifest has under its name.
    one, other = (published.path(name).read_bytes() for name in CONTAINERS)
    with (
        published.content(CONTAINERS[0], other),
        published.content(CONTAINERS[1], one),
    ):
        for name in CONTAINERS:
            published.refusal(name, name)


def test_a_manifest_of_another_tag_is_found(published):
    with published.content(MANIFEST, published.path(MANIFEST, "step-1").read_bytes()):
        for name in CONTAINERS:
            with pytest.raises(CorruptCheckpointError, match="step-1"):
                published.engine.load(name, tag=TAG)
