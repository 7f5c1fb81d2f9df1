"""Directories that a framework fills are tags that are published in the background."""

import os
import signal

import pytest
import torch

from aiockpt import EngineStateError
from aiockpt.catalog import Catalog
from aiockpt.config import EngineConfig
from aiockpt.integrations.background import BackgroundTags
from aiockpt.sync import CheckpointEngine
from gates import RING_8_MIB, held, in_thread


@pytest.fixture
def tags(root):
    tags = BackgroundTags(root, EngineConfig.parse(RING_8_MIB))
    yield tags
    tags.close()


def save(tags: BackgroundTags, tag: str) -> None:
    with tags.saving(tag) as directory:
        torch.save({"w": torch.arange(3)}, f"{directory}/model.pt")


def test_what_is_saved_in_the_block_is_a_tag(root, tags):
    with tags.saving("a") as directory:
        torch.save({"w": torch.arange(3)}, f"{directory}/sub/model.pt")
        with open(f"{directory}/notes.txt", "w") as file:
            file.write("text")
    tags.drain()
    assert tags.tags() == ["a"]
    assert torch.load(root / "a/sub/model.pt")["w"].tolist() == [0, 1, 2]
    assert (root / "a/notes.txt").read_text() == "text"


def test_ctrl_c_while_a_tag_is_opened_leaves_none_open(tags, monkeypatch):
    with held(monkeypatch, Catalog, "new_directory") as gate:

        def interrupt() -> None:
            gate.wait_reached()
            os.kill(os.getpid(), signal.SIGINT)
            gate.open()

        interrupting = in_thread(interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(tags, "a")
        interrupting.result()
    save(tags, "a")
    tags.drain()
    assert tags.tags() == ["a"]


def test_what_is_being_read_is_left_when_tags_are_removed(root, tags):
    for tag in ("a", "b"):
        save(tags, tag)
    tags.drain()
    with CheckpointEngine(root, RING_8_MIB) as reader, reader.reading("a"):
        tags.delete(["a", "b", "gone"])
        assert tags.tags() == ["a"]


def test_a_failure_of_the_block_is_raised_and_publishes_nothing(tags):
    with pytest.raises(ZeroDivisionError), tags.saving("a"):
        raise ZeroDivisionError
    save(tags, "b")
    tags.drain()
    assert tags.tags() == ["b"]


def test_the_next_block_waits_for_the_one_before_and_raises_what_failed(
    tags, monkeypatch
):
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise EngineStateError("injected")

        patch.setattr(Catalog, "publish", refuse)
        save(tags, "a")
        with pytest.raises(EngineStateError, match="injected"):
            save(tags, "b")
    save(tags, "b")
    tags.drain()
    assert tags.tags() == ["b"]
