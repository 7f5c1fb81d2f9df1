"""Row 9: bytes that are not those that were saved are told, and never handed out."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aiockpt.errors import CorruptCheckpointError
from aiockpt.tag_reader import TagReader
from aiockpt.testing.faults import Fault, FlipBit, Lie, inject
from aiockpt.testing.roots import assert_root_consistent
from catalogs import storage_at
from faults.damage import (
    BLOCK,
    FILES,
    assert_detected,
    flipped,
    make_two_tags,
    replaced,
)
from faults.driver import link_root, spoil
from workloads import SMALL, Engine, content, state

files = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module")
def tags(lasting_memory: Path) -> Path:
    return make_two_tags(lasting_memory / "tags")


@pytest.fixture
def engine(tags: Path) -> Iterator[Engine]:
    with Engine(tags, SMALL) as engine:
        yield engine


def test_every_changed_byte_of_a_manifest_is_told(cases, tags):
    path = tags / "one" / ".aiockpt" / "manifest.json"
    data = path.read_bytes()
    reader = TagReader(storage_at(tags))
    for index in range(len(data)):
        for bit in range(cases.pick(1, 8)):
            changed = flipped(data, 8 * index + (index + bit) % 8)
            with cases.case(9, "a bit of the manifest", index), replaced(path, changed):
                with pytest.raises(CorruptCheckpointError) as caught:
                    reader.manifest("one")
                assert str(caught.value.path) == str(path)
    assert reader.manifest("one").tag == "one"


def test_every_cut_of_a_manifest_is_told(cases, tags):
    path = tags / "one" / ".aiockpt" / "manifest.json"
    data = path.read_bytes()
    reader = TagReader(storage_at(tags))
    for length in range(0, len(data), cases.pick(5, 1)):
        with cases.case(9, "a cut manifest", length), replaced(path, data[:length]):
            with pytest.raises(CorruptCheckpointError):
                reader.manifest("one")


@files
def test_any_flipped_bit_of_a_file_is_told(cases, tags, engine, name):
    path = tags / "one" / name
    data = path.read_bytes()
    chosen = random.Random(f"bits of {name}")
    # Everywhere, and more often at the ends, where the structure is.
    bits = [chosen.randrange(8 * len(data)) for _ in range(cases.pick(400, 5000))]
    ends = [*range(8 * 300), *range(8 * (len(data) - 600), 8 * len(data))]
    bits += chosen.sample(ends, cases.pick(300, 3000))
    num_placed = 0
    for bit in bits:
        with cases.case(9, "a bit of a file", f"{name}, {bit}"):
            with replaced(path, flipped(data, bit)):
                error = assert_detected(engine, "one", name)
            if "do not have the checksum" in str(error):
                assert error.offset is not None
                assert error.offset <= bit // 8
                num_placed += 1
    # safetensors has no checksums of its parts.
    assert num_placed > len(bits) // 4 or not name.endswith(".pt")


@files
def test_a_file_of_another_length_is_told(cases, tags, engine, name):
    path = tags / "one" / name
    data = path.read_bytes()
    edges = range(0, len(data) + 2 * BLOCK, BLOCK)
    lengths = {max(edge + off, 0) for edge in edges for off in (-1, 0, 1)}
    lengths |= {len(data) - 1, len(data) + 1, 1}
    for length in sorted(lengths - {len(data)}):
        changed = data[:length].ljust(length, b"\0")
        with cases.case(9, "another length", f"{name}, {length}"):
            with replaced(path, changed):
                assert_detected(engine, "one", name)


@files
def test_a_zeroed_stale_or_swapped_block_is_told(cases, tags, engine, name):
    path = tags / "one" / name
    data, other = path.read_bytes(), (tags / "two" / name).read_bytes()
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    for index, block in enumerate(blocks):
        start = index * BLOCK
        last = blocks[index - 1][: len(block)].ljust(len(block), b"\0")
        for what, found in {
            "zeroed": bytes(len(block)),
            "of another tag": other[start : start + len(block)],
            "of another place": last,
        }.items():
            changed = data[:start] + found + data[start + len(block) :]
            if changed == data:
                continue
            with cases.case(9, f"a block {what}", f"{name}, {index}"):
                with replaced(path, changed):
                    assert_detected(engine, "one", name)


@files
def test_a_file_of_another_tag_is_told(cases, tags, engine, name):
    with cases.case(9, "a file of another tag", name):
        with replaced(tags / "one" / name, (tags / "two" / name).read_bytes()):
            assert_detected(engine, "one", name)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_of_another_rank_is_told(cases, memory, suffix):
    names = [f"rank_{rank}.{suffix}" for rank in range(2)]
    with Engine(memory / "root", SMALL) as engine:
        engine.create("one")
        for rank, name in enumerate(names):
            engine.save({"w": torch.arange(2500) + rank}, name)
        engine.commit("one")
        paths = [memory / "root" / "one" / name for name in names]
        own, other = [path.read_bytes() for path in paths]
        assert len(own) == len(other)
        with cases.case(9, "a file of another rank", suffix):
            with replaced(paths[0], other), replaced(paths[1], own):
                for name in names:
                    assert_detected(engine, "one", name)


def test_a_manifest_of_another_tag_is_told(cases, tags, engine):
    path = tags / "one" / ".aiockpt" / "manifest.json"
    other = (tags / "two" / ".aiockpt" / "manifest.json").read_bytes()
    with cases.case(9, "a manifest of another tag", ""), replaced(path, other):
        with pytest.raises(CorruptCheckpointError, match="is of tag 'two'"):
            engine.load("model.pt", tag="one")


# --- on the way to the disk -------------------------------------------------------


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("action", [Lie(), FlipBit(100, 3), FlipBit(0)], ids=str)
def test_a_write_that_was_dropped_or_changed_is_told_by_the_load(
    cases, template, action, nth
):
    root = link_root(template)
    with cases.case(9, f"{action} on a write", nth):
        outcome, injection = spoil(root, "save", Fault("pwrite", action, nth=nth))

        # The sums are those of the memory: the file is published, and found out.
        assert outcome.is_done
        assert len(injection.spoiled) == 1
        with pytest.raises(AssertionError, match="CRC-32"):
            assert_root_consistent(root)
        name = injection.spoiled[0].path.partition("/work/")[2].split("/", 2)[2]
        with Engine(root, SMALL) as engine:
            assert_detected(engine, "new", name)


@pytest.mark.parametrize("action", [Lie(), FlipBit(5, 1)], ids=str)
def test_a_manifest_that_was_dropped_or_changed_hides_its_tag_and_no_other(
    cases, template, action
):
    root = link_root(template)
    with cases.case(9, f"{action} on a manifest", ""):
        spoil(root, "save", Fault("write", action, path="manifest.json"))

        with Engine(root, SMALL) as engine:
            with pytest.raises(CorruptCheckpointError):
                engine.load("model.pt", tag="new")
            assert [info.tag for info in engine.tags()] == ["older", "old"]
            assert engine.latest() == "old"


def test_a_bit_that_flips_on_its_way_from_the_disk_is_told(cases, template):
    root = link_root(template)
    num_told = 0
    with Engine(root, SMALL) as engine:
        for nth in range(1, 7):
            fault = Fault("pread", FlipBit(7, 2), path="old/model.pt", nth=nth)
            with cases.case(9, "a bit flipped by a read", nth):
                with inject(fault) as injection:
                    try:
                        loaded = engine.load("model.pt", tag="old")
                    except CorruptCheckpointError:
                        num_told += 1
                    else:
                        # It was in bytes that are only looked at, and read again.
                        assert content(loaded) == content(state(2))
                assert injection.spoiled
        assert num_told >= 3
        assert content(engine.load("model.pt", tag="old")) == content(state(2))
