"""Weights for inference: a module in safetensors, in one file or several; plain files."""

import json
import random
import zlib

import pytest
import safetensors.torch
import torch
from torch import nn

import aiockpt
import aiockpt.sync
from aiockpt import CheckpointEngine, CorruptCheckpointError, InvalidArgumentError
from aiockpt.sharding import sharded
from gates import RING_8_MIB


class Tied(nn.Module):
    """A head tied to the embedding, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 7, bias=False)
        self.embedding = nn.Embedding(7, 4)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("cache", torch.zeros(9), persistent=False)


class Declared(Tied):
    """As `transformers` says which name is made from the other."""

    _tied_weights_keys = {"embedding.weight": "head.weight"}  # noqa: RUF012
    _keys_to_ignore_on_save = ["norm.num_batches_tracked"]  # noqa: RUF012


class DeclaredInAPart(nn.Module):
    def __init__(self, keys: object) -> None:
        super().__init__()
        self.part = Tied()
        self.part._tied_weights_keys = keys


@pytest.fixture
async def engine(root):
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        yield engine


def header(path) -> dict[str, object]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


async def saved(engine, module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    await engine.save(module, "model.safetensors")
    await engine.commit("a")
    path = f"{engine.root}/a/model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    return safetensors.torch.load_file(path), metadata


async def test_a_module_stands_for_its_state_dict_each_tensor_once(engine):
    module = Tied()
    found, metadata = await saved(engine, module)
    expected = module.state_dict()
    del expected["head.weight"]
    assert found.keys() == expected.keys()
    assert "cache" not in found
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert metadata == {"format": "pt", "head.weight": "embedding.weight"}


async def test_the_file_is_the_one_that_safetensors_writes(engine, tmp_path):
    module = Tied()
    await engine.save(module, "model.safetensors")
    await engine.commit("a")
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_model(module, theirs, {"format": "pt"})
    found, expected = header(tmp_path / "root/a/model.safetensors"), header(theirs)
    assert found == expected


async def test_of_tied_names_the_one_that_is_not_declared_is_written(engine):
    found, metadata = await saved(engine, Declared())
    assert "head.weight" in found
    assert "embedding.weight" not in found
    assert metadata["embedding.weight"] == "head.weight"
    assert "norm.num_batches_tracked" not in found


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        (["embedding.weight"], "part.head.weight"),
        ({"head.weight": "embedding.weight"}, "part.embedding.weight"),
        ({r"(head|embedding)\.weight": ""}, "part.head.weight"),
        (None, "part.embedding.weight"),
    ],
)
async def test_a_part_declares_its_own_tied_names(engine, keys, kept):
    found, _ = await saved(engine, DeclaredInAPart(keys))
    names = {"part.head.weight", "part.embedding.weight"}
    assert names & found.keys() == {kept}


async def test_what_a_part_declares_is_said_of_that_part_only(engine):
    module = nn.ModuleDict({"a": Tied(), "b": Tied()})
    module["a"]._tied_weights_keys = {"embedding.weight": "head.weight"}
    _, metadata = await saved(engine, module)
    assert metadata["a.embedding.weight"] == "a.head.weight"
    assert metadata["b.head.weight"] == "b.embedding.weight"


async def test_a_transposed_view_is_a_tensor_of_its_own(engine):
    module = nn.Linear(3, 3)
    module.register_buffer("transposed", module.weight.detach().t())
    found, _ = await saved(engine, module)
    assert torch.equal(found["transposed"], module.weight.t())
    assert torch.equal(found["weight"], module.weight)


async def test_a_conjugate_is_not_tied_to_what_it_is_one_of_and_so_refused(engine):
    module = nn.Module()
    module.register_buffer("plain", torch.randn(3, dtype=torch.complex64))
    # Of tied names the first would be written.
    module.register_buffer("turned", module.plain.conj())
    await engine.save(module, "model.safetensors")
    with pytest.raises(InvalidArgumentError, match="turned"):
        await engine.commit("a")


async def test_a_part_of_a_tensor_is_not_tied_to_it_and_so_refused(engine):
    module = nn.Linear(3, 3)
    module.register_buffer("rows", module.weight.detach()[:2])
    await engine.save(module, "model.safetensors")
    with pytest.raises(InvalidArgumentError, match="share memory"):
        await engine.commit("a")


@pytest.mark.parametrize("save", [aiockpt.save, aiockpt.sync.save])
async def test_the_one_file_door_takes_a_module_too(tmp_path, save):
    module = Tied()
    done = save(module, tmp_path / "m.safetensors", metadata={"step": "7"})
    if done is not None:
        await done
    assert header(tmp_path / "m.safetensors")["__metadata__"] == {
        "format": "pt",
        "head.weight": "embedding.weight",
        "step": "7",
    }
    other = Tied()
    assert safetensors.torch.load_model(other, tmp_path / "m.safetensors") == (
        set(),
        [],
    )


@pytest.mark.parametrize("kind", [Tied, Declared])
async def test_tied_weights_are_loaded_into_a_module_and_stay_tied(
    engine, kind, monkeypatch
):
    monkeypatch.setattr(kind, "_keys_to_ignore_on_save", None, raising=False)
    module, other = kind(), kind()
    await engine.save(module, "model.safetensors")
    await engine.commit("a")
    await engine.load("model.safetensors", into=other)
    assert other.head.weight is other.embedding.weight
    for name, value in other.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])


async def test_a_target_that_is_not_tied_must_still_be_in_the_file(engine):
    await engine.save(Tied(), "model.safetensors")
    await engine.commit("a")
    untied = Tied()
    untied.head.weight = nn.Parameter(torch.zeros(7, 4))
    with pytest.raises(InvalidArgumentError, match=r"head\.weight: not in the file"):
        await engine.load("model.safetensors", into=untied)


async def test_weights_that_are_not_contiguous_are_written_row_by_row(engine):
    module = nn.Linear(3, 5)
    module.weight = nn.Parameter(torch.arange(15.0).reshape(3, 5).t())
    found, _ = await saved(engine, module)
    assert torch.equal(found["weight"], module.weight)


async def test_a_dict_with_tied_tensors_is_refused_with_the_remedy(engine):
    await engine.save(Tied().state_dict(), "model.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"share memory.*passed itself"):
        await engine.commit("a")


async def test_weights_that_are_no_tensors_are_refused_by_name(engine):
    class Odd(nn.Module):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(InvalidArgumentError, match="'_extra_state' is a dict"):
        await engine.save(Odd(), "model.safetensors")
    await engine.abort("a")


async def test_a_module_in_another_container_is_saved_as_torch_saves_it(engine):
    await engine.save(nn.Linear(2, 2), "model.pt")
    await engine.commit("a")
    loaded = await engine.load("model.pt", weights_only=False)
    assert isinstance(loaded, nn.Linear)


# --- several files ----------------------------------------------------------------


async def test_weights_that_fit_are_one_file_without_an_index(engine, root):
    handles = await engine.save_sharded(Tied())
    assert [handle.path for handle in handles] == ["model.safetensors"]
    await engine.commit("a")
    assert "model.safetensors.index.json" not in {
        path.name for path in (root / "a").iterdir()
    }


async def test_weights_that_do_not_fit_are_dealt_out_and_indexed(engine, root):
    state = {name: torch.full((size,), 1.0) for name, size in SIZES.items()}
    handles = await engine.save_sharded(state, directory="hf", max_shard_bytes=40)
    await engine.commit("a")
    index = json.loads((root / "a/hf/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * sum(SIZES.values())}
    assert len(handles) == len(set(index["weight_map"].values())) + 1
    for name, file in index["weight_map"].items():
        found = safetensors.torch.load_file(root / "a/hf" / file)
        assert torch.equal(found[name], state[name])
    assert header(root / "a/hf/model-00001-of-00004.safetensors")["__metadata__"] == {
        "format": "pt"
    }
    files = {entry.path for entry in (await engine.tags())[0].files}
    assert files == {handle.path for handle in handles}


# Floats; ten fit into 40 bytes.
SIZES = {"a": 4, "b": 6, "c": 1, "huge": 11, "d": 9, "e": 1}


def names_by_file(state, **kwargs) -> dict[str, list[str]]:
    return {
        file.path: list(file.state)
        for file in sharded(state, **kwargs)
        if isinstance(file.state, dict)
    }


def test_tensors_are_dealt_out_in_order_and_the_largest_stand_alone():
    state = {name: torch.zeros(size) for name, size in SIZES.items()}
    assert list(names_by_file(state, max_shard_bytes=40).values()) == [
        ["a", "b"],
        ["huge"],
        ["c", "d"],
        ["e"],
    ]


def test_a_tensor_that_fills_a_file_comes_in_its_turn():
    state = {
        name: torch.zeros(size) for name, size in {"a": 4, "b": 10, "c": 1}.items()
    }
    assert list(names_by_file(state, max_shard_bytes=40).values()) == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_one_tensor_that_is_too_large_is_one_file():
    assert names_by_file({"huge": torch.zeros(11)}, max_shard_bytes=40) == {
        "model.safetensors": ["huge"]
    }


def test_the_layout_is_that_of_hugging_face():
    hub = pytest.importorskip("huggingface_hub")
    sizes = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(1))
    state = {f"w.{i}": torch.zeros(int(size)) for i, size in enumerate(sizes)}
    for limit in (100, 1000, 1200, 5000, 10**6):
        theirs = hub.split_torch_state_dict_into_shards(
            state,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=limit,
        )
        assert names_by_file(state, max_shard_bytes=limit) == theirs.filename_to_tensors


def test_ties_are_told_in_the_file_that_has_the_tensor():
    files = sharded(Tied(), max_shard_bytes=112)
    told = [file for file in files if file.metadata and len(file.metadata) > 1]
    assert [file.metadata for file in told] == [
        {"format": "pt", "head.weight": "embedding.weight"}
    ]
    assert "embedding.weight" in told[0].state


def test_tensors_of_two_files_that_share_memory_are_refused():
    whole = torch.zeros(100)
    with pytest.raises(InvalidArgumentError, match="share memory"):
        sharded({"a": whole[:60], "b": whole[50:]}, max_shard_bytes=240)


def test_parts_of_one_memory_that_do_not_overlap_are_separate_tensors():
    whole = torch.zeros(100)
    state = {"a": whole[:50], "b": whole[50:]}
    assert len(names_by_file(state, max_shard_bytes=200)) == 2


@pytest.mark.parametrize("limit", [0, -1, 1.5, "5GB", True, None])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(InvalidArgumentError, match="max_shard_bytes"):
        sharded({}, max_shard_bytes=limit)


def test_no_weights_are_one_file():
    [file] = sharded({})
    assert (file.path, file.state) == ("model.safetensors", {})


# --- plain files --------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, (9 << 20) + 1])
async def test_bytes_are_a_file_of_the_tag_like_any_other(engine, root, nbytes):
    data = random.Random(1).randbytes(nbytes)
    handle = await engine.save_bytes(data, "sub/notes.bin")
    await handle.staged()
    report = await engine.commit("a")
    assert (root / "a/sub/notes.bin").read_bytes() == data
    [entry] = (await engine.tags())[0].files
    assert (entry.path, entry.nbytes) == ("sub/notes.bin", nbytes)
    assert entry.crc32 == zlib.crc32(data)
    assert report.stage_s >= 0
    assert await engine.load_bytes("sub/notes.bin") == data


async def test_text_is_written_as_utf_8_whatever_the_suffix(engine, root):
    await engine.save_bytes('{"größe": 1}\n', "config.json")
    await engine.save_bytes("no tensors", "odd.safetensors")
    await engine.commit("a")
    assert (root / "a/config.json").read_text("utf-8") == '{"größe": 1}\n'
    assert await engine.load_bytes("odd.safetensors", tag="a") == b"no tensors"


async def test_bytes_that_the_caller_changes_later_are_written_as_they_were(engine):
    data = bytearray(b"before")
    await engine.save_bytes(data, "notes")
    data[:] = b"behind"
    await engine.commit("a")
    assert await engine.load_bytes("notes") == b"before"


@pytest.mark.parametrize("data", [None, 7, {"a": 1}, ["text"], "\ud800"])
async def test_what_is_neither_text_nor_bytes_is_refused(engine, data):
    with pytest.raises(InvalidArgumentError, match="text"):
        await engine.save_bytes(data, "notes")
    await engine.abort("a")


async def test_a_flipped_byte_of_a_plain_file_is_found(engine, root):
    await engine.save_bytes("abc", "notes")
    await engine.commit("a")
    (root / "a/notes").write_bytes(b"abd")
    with pytest.raises(CorruptCheckpointError, match="CRC-32"):
        await engine.load_bytes("notes")


def test_the_blocking_door_writes_and_reads_them_too(root):
    with aiockpt.sync.CheckpointEngine(root, RING_8_MIB) as engine:
        engine.create("a")
        engine.save_bytes("text", "notes").written()
        handles = engine.save_sharded(Tied(), max_shard_bytes=16)
        assert handles[-1].path == "model.safetensors.index.json"
        engine.commit("a")
        assert engine.load_bytes("notes") == b"text"
