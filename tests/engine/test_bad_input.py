"""Bad input gets a clear, typed error; nothing is written or lost, the engine goes on."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aiockpt import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    InvalidArgumentError,
    StorageError,
)
from goes_on import KEPT, engine_that_goes_on

# --- the configuration -------------------------------------------------------------

CONFIGS: dict[str, tuple[object, str]] = {
    "misspelt": ({"host_cach_size": 1}, "'host_cach_size'.*'host_cache_size'"),
    "unknown": ({"parser_thread": 2}, "'parser_thread'.*'parser_threads'"),
    "nested": ({"aiockpt": {"gard": True}}, "'gard'.*'guard'"),
    "datastates": ({"datastates_ckpt": {"x": 1}}, "unknown config key 'x'"),
    "not a mapping": (7, "EngineConfig or a mapping"),
    "negative": ({"host_cache_size": -1}, "host_cache_size.*-1"),
    "zero": ({"host_cache_size": 0}, "host_cache_size.*8 MiB"),
    "too small": ({"host_cache_size": 0.001}, "host_cache_size.*8 MiB"),
    "absurd": ({"host_cache_size": 1e9}, "host_cache_size"),
    "more than can be addressed": ({"host_cache_size": 1 << 19}, "cannot be reserved"),
    "nan": ({"host_cache_size": float("nan")}, "host_cache_size.*nan"),
    "infinite": ({"host_cache_size": float("inf")}, "host_cache_size.*inf"),
    "text": ({"host_cache_size": "2"}, "host_cache_size.*'2'"),
    "none": ({"host_cache_size": None}, "host_cache_size.*None"),
    "no threads": ({"parser_threads": 0}, "parser_threads.*0"),
    "negative threads": ({"parser_threads": -2}, "parser_threads.*-2"),
    "half a thread": ({"parser_threads": 1.5}, "parser_threads.*1.5"),
    "boolean threads": ({"parser_threads": True}, "parser_threads.*True"),
    "absurd threads": ({"parser_threads": 10**6}, "parser_threads"),
    "guard of text": ({"guard": "yes"}, "guard.*'yes'"),
    "retention": ({"retention": [7]}, "retention"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_configuration_is_refused_and_starts_nothing(config, message, root):
    before = set(threading.enumerate())
    with pytest.raises(InvalidArgumentError, match=message):
        CheckpointEngine(root, config)
    assert set(threading.enumerate()) <= before
    assert not root.exists()


# --- tags ----------------------------------------------------------------------------

TAGS = {
    "slash": "a/b",
    "absolute": "/tmp",  # noqa: S108
    "parent": "..",
    "this": ".",
    "hidden": ".hidden",
    "private": ".aiockpt",
    "nul": "a\0b",
    "newline": "a\n",
    "backslash": "a\\b",
    "empty": "",
    "pointer": "latest",
    "long": "x" * 256,
    "surrogate": "\ud800",
    "number": 7,
    "bytes": b"a",
    "none": None,
    "path": Path("a"),
}


@pytest.mark.parametrize("tag", TAGS.values(), ids=TAGS)
async def test_an_unusable_tag_is_refused(tag, root):
    async with engine_that_goes_on(root) as engine:
        with pytest.raises(InvalidArgumentError, match=r"tag|name|valid"):
            await engine.create(tag)
        with pytest.raises(InvalidArgumentError, match=r"tag|name|valid"):
            await engine.delete(tag)
        if tag is not None:
            with pytest.raises(InvalidArgumentError, match=r"tag|name|valid"):
                await engine.load("model.pt", tag=tag)
            for call in (engine.staged, engine.commit, engine.abort):
                with pytest.raises(EngineStateError, match="is not open"):
                    await call(tag)


async def test_a_tag_that_is_not_open_takes_no_files(root):
    async with engine_that_goes_on(root) as engine:
        for tag in ("unknown", "kept"):
            with pytest.raises(EngineStateError, match=rf"'{tag}' is not open.*'open'"):
                await engine.save(KEPT, "model.pt", tag=tag)
            with pytest.raises(EngineStateError, match="is not open"):
                await engine.commit(tag)
            with pytest.raises(EngineStateError, match="is not open"):
                await engine.abort(tag)


async def test_with_no_tag_open_a_save_says_to_create_one(root):
    async with CheckpointEngine(root) as engine:
        with pytest.raises(EngineStateError, match=r"no tag is open.*`create`"):
            await engine.save(KEPT, "model.pt")
    assert not root.exists()


async def test_a_tag_is_not_created_over_another(root):
    async with engine_that_goes_on(root) as engine:
        with pytest.raises(EngineStateError, match=r"'kept' is published.*overwrite"):
            await engine.create("kept")
        for overwrite in (False, True):
            with pytest.raises(EngineStateError, match="'open' is open already"):
                await engine.create("open", overwrite=overwrite)


async def test_an_empty_tag_is_not_committed_and_stays_open(root):
    async with engine_that_goes_on(root) as engine:
        for _ in range(2):
            with pytest.raises(
                EngineStateError, match=r"nothing has been saved.*'open'"
            ):
                await engine.commit("open")


# --- paths ---------------------------------------------------------------------------

PATHS = {
    "absolute": "/etc/passwd",
    "parent": "../model.pt",
    "hidden parent": "a/../../model.pt",
    "inner parent": "a/../model.pt",
    "empty": "",
    "this": ".",
    "root": "/",
    "directory": "a/",
    "nul": "a\0.pt",
    "newline": "a\n.pt",
    "private": ".aiockpt/manifest.json",
    "long": "x" * 256,
    "surrogate": "\ud800.pt",
    "number": 7,
    "bytes": b"model.pt",
    "none": None,
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
async def test_an_unusable_path_is_refused(path, root):
    async with engine_that_goes_on(root) as engine:
        with pytest.raises(
            InvalidArgumentError, match=r"path|tag|name|directory|valid"
        ):
            await engine.save(KEPT, path)


async def test_an_absolute_path_must_lie_in_its_own_tag(root):
    async with engine_that_goes_on(root) as engine:
        for place in (root / "kept", root, root / "openly", root.parent):
            with pytest.raises(InvalidArgumentError, match="outside the tag"):
                await engine.save(KEPT, place / "model.pt")
        with pytest.raises(InvalidArgumentError, match="outside the tag"):
            await engine.save(KEPT, root / "open")


async def test_a_path_is_saved_once_in_a_tag(root):
    async with engine_that_goes_on(root) as engine:
        await engine.save(KEPT, "model.pt")
        for path in ("model.pt", "./model.pt", root / "open" / "model.pt"):
            with pytest.raises(
                InvalidArgumentError, match="saved in tag 'open' already"
            ):
                await engine.save({}, path)
        with pytest.raises(InvalidArgumentError, match="side by side"):
            await engine.save({}, "model.pt/deeper.pt")


# --- values --------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> str:
        raise TypeError("never")


VALUES: dict[str, Callable[[], object]] = {
    "lambda": lambda: lambda: None,
    "lock": threading.Lock,
    "generator": lambda: (n for n in range(3)),
    "class of its own mind": Unpicklable,
    "local class": type("Local", (), {}),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
async def test_a_value_that_cannot_be_pickled_is_refused_by_key(make, root):
    state = {"fine": 1, "opt": [{"hook": make()}]}
    async with engine_that_goes_on(root) as engine:
        with pytest.raises(InvalidArgumentError) as refused:
            await engine.save(state, "model.pt")
        assert 'state["opt"][0]["hook"] cannot be saved' in str(refused.value)
        assert refused.value.__cause__ is not None
        # As if it had not been called: the path is free.
        await engine.save(KEPT, "model.pt")


NOT_FOR_SAFETENSORS: dict[str, tuple[Callable[[], object], str]] = {
    "not a dict": (lambda: [torch.ones(1)], "flat dict"),
    "number": (lambda: {"fine": torch.ones(1), "step": 7}, "step"),
    "nested": (lambda: {"layer": {"w": torch.ones(1)}}, "layer"),
    "sparse": (lambda: {"adj": torch.eye(2).to_sparse()}, "adj"),
    "key": (lambda: {7: torch.ones(1)}, "7"),
}


@pytest.mark.parametrize(
    ("make", "message"), NOT_FOR_SAFETENSORS.values(), ids=NOT_FOR_SAFETENSORS
)
async def test_what_safetensors_cannot_hold_fails_the_tag_and_names_the_key(
    make, message, root
):
    async with engine_that_goes_on(root) as engine:
        await engine.create("wrong")
        handle = await engine.save(make(), "model.safetensors")
        for wait in (handle.staged, lambda: engine.commit("wrong")):
            with pytest.raises(InvalidArgumentError, match=message):
                await wait()


@pytest.mark.parametrize("nbytes_left", [0, 2000])
@pytest.mark.parametrize("path", ["model.pt", "model.safetensors"])
async def test_a_tensor_whose_storage_was_freed_fails_the_tag_by_its_key(
    path, nbytes_left, root
):
    state = {"fine": torch.ones(3), "layer.w": torch.ones(1000)}
    async with engine_that_goes_on(root) as engine:
        # What is freed between two saves is noticed, however alike they are.
        await engine.save(state, path, tag="open")
        await engine.staged()
        state["layer.w"].untyped_storage().resize_(nbytes_left)
        await engine.create("wrong")
        await engine.save(state, path, tag="wrong")
        with pytest.raises(InvalidArgumentError, match=r"layer\.w"):
            await engine.commit("wrong")


async def test_metadata_is_for_safetensors(root):
    async with engine_that_goes_on(root) as engine:
        await engine.create("wrong")
        await engine.save(KEPT, "model.pt", metadata={"step": "7"})
        with pytest.raises(InvalidArgumentError, match=r"metadata.*'model.pt'"):
            await engine.commit("wrong")


# --- loading -------------------------------------------------------------------------


async def test_what_is_missing_is_not_found_and_the_message_lists_what_is_there(root):
    async with engine_that_goes_on(root) as engine:
        missing_tag = "no tag 'nope'.*published: kept"
        with pytest.raises(CheckpointNotFoundError, match=missing_tag):
            await engine.load("model.pt", tag="nope")
        with pytest.raises(CheckpointNotFoundError, match=missing_tag):
            await engine.delete("nope")
        with pytest.raises(CheckpointNotFoundError, match="no tag 'open'"):
            await engine.load("model.pt", tag="open")
        with pytest.raises(CheckpointNotFoundError, match=r"'nope.pt'.*'model.pt'"):
            await engine.load("nope.pt")
        for path in ("../model.pt", "/etc/passwd", ".aiockpt/manifest.json", ""):
            with pytest.raises(InvalidArgumentError):
                await engine.load(path)


async def test_an_empty_root_has_nothing_to_load(root):
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointNotFoundError, match="nothing is published"):
            await engine.load("model.pt")
    assert not root.exists()


@pytest.mark.parametrize("pointer", [b"", b"nope\n", b"\xff\xfe", b"../x\n", None])
async def test_a_latest_that_is_torn_or_dangles_is_repaired(pointer, root):
    async with CheckpointEngine(root) as engine:
        for tag in ("old", "new"):
            await engine.create(tag)
            await engine.save(KEPT, "model.pt")
            await engine.commit(tag)
        if pointer is None:
            (root / "latest").unlink()
        else:
            (root / "latest").write_bytes(pointer)
        assert torch.equal((await engine.load("model.pt"))["w"], KEPT["w"])
        assert await engine.latest() == "new"
    assert (root / "latest").read_bytes() == b"new\n"


def truncated(path: Path) -> None:
    path.write_bytes(b"")


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def removed(path: Path) -> None:
    path.unlink()


def linked_out(path: Path) -> None:
    elsewhere = path.parent.parent.parent / "elsewhere.pt"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (truncated, CorruptCheckpointError),
        (shortened, CorruptCheckpointError),
        (removed, CheckpointNotFoundError),
        (linked_out, StorageError),
    ],
)
async def test_a_published_file_that_was_tampered_with_is_not_loaded(
    damage, error, root
):
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        await engine.save(KEPT, "model.pt")
        await engine.commit("a")
        damage(root / "a" / "model.pt")
        with pytest.raises(error, match=r"model\.pt"):
            await engine.load("model.pt")
