"""What `load` returns is what the manifest says was saved."""

import shutil

import pytest
import torch

import aiockpt
from aiockpt.storage.local_read import LocalReadFile


@pytest.fixture
async def engine(root):
    async with aiockpt.CheckpointEngine(root, {"host_cache_size": 0.0625}) as engine:
        for tag, value in (("one", 1.0), ("two", 2.0)):
            await engine.create(tag)
            for name in ("model.pt", "model.safetensors"):
                await engine.save({"w": torch.full((5000,), value)}, name)
            await engine.commit(tag)
        yield engine


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
async def test_a_file_of_another_tag_in_its_place_is_refused(engine, root, name):
    shutil.copy(root / "one" / name, root / "two" / name)

    with pytest.raises(aiockpt.CorruptCheckpointError, match=r"manifest describes"):
        await engine.load(name, tag="two")
    assert torch.equal(
        (await engine.load(name, tag="one"))["w"], torch.full((5000,), 1.0)
    )


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("at", [0.3, 0.5, 0.9])
async def test_a_flipped_bit_is_found_before_data_is_returned(engine, root, name, at):
    path = root / "two" / name
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)

    with pytest.raises(aiockpt.CorruptCheckpointError) as caught:
        await engine.load(name)
    assert str(path) in str(caught.value)


async def test_a_flipped_bit_in_a_torch_file_names_the_tensor(engine, root):
    path = root / "two" / "model.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(aiockpt.CorruptCheckpointError, match=r"\bw\b") as caught:
        await engine.load("model.pt")
    assert caught.value.key == "w"


async def test_what_is_not_verified_is_returned_as_it_is(engine, root):
    path = root / "two" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    state = await engine.load("model.safetensors", verify=False)
    assert not torch.equal(state["w"], torch.full((5000,), 2.0))


class Flips:
    """Flips a bit of what is read of the `w`s, the `nth` time that it is read."""

    def __init__(self, monkeypatch, nth):
        self.num_reads = 0
        read_block = LocalReadFile.read_block

        def flipped(file, offset, view):
            read_block(file, offset, view)
            nbytes = max(min(len(view), file.nbytes - offset), 0)
            at = bytes(view[:nbytes]).find(torch.full((5,), 2.0).numpy().tobytes())
            if at >= 0:
                self.num_reads += 1
                if self.num_reads == nth:
                    view[at + 9] ^= 1

        monkeypatch.setattr(LocalReadFile, "read_block", flipped)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("nth", [1, 2])
async def test_what_is_read_again_for_a_strided_target_is_checked_again(
    engine, name, nth, monkeypatch
):
    target = torch.zeros(5000, 2)[:, 0]
    flips = Flips(monkeypatch, nth)
    with pytest.raises(aiockpt.CorruptCheckpointError, match=name):
        await engine.load(name, into={"w": target})
    assert flips.num_reads >= nth
    assert not target.any()
    await engine.load(name, into={"w": target})
    assert target.eq(2).all()


async def test_what_is_read_again_is_not_checked_where_nothing_is(engine, monkeypatch):
    target = torch.zeros(5000, 2)[:, 0]
    flips = Flips(monkeypatch, 1)
    await engine.load("model.safetensors", into={"w": target}, verify=False)
    assert flips.num_reads == 1
    assert (target != 2).sum() == 1
