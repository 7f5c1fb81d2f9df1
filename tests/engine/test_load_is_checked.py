"""What `load` returns is what the manifest says was saved."""

import shutil

import pytest
import torch

import aiockpt


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
