"""A tag is a directory that `transformers` opens: weights, index and configuration."""

import asyncio
import json
import os
from pathlib import Path

import pytest
import torch

from aiockpt import CheckpointEngine, InvalidArgumentError
from aiockpt.sync import CheckpointEngine as BlockingEngine
from gates import RING_8_MIB

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5")
tqdm = pytest.importorskip("tqdm")
# Its bars start a thread that nobody ends.
tqdm.tqdm.monitor_interval = 0

from aiockpt.integrations.transformers import (  # noqa: E402 - only where it can be
    pretrained_files,
    save_pretrained,
    save_pretrained_blocking,
)

# It warns of itself and of its packages.
pytestmark = pytest.mark.filterwarnings("default")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def gpt2(**kwargs):
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32, **kwargs
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**kwargs):
    config = transformers.LlamaConfig(**SIZES, **kwargs)
    return transformers.LlamaForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


MODELS = {
    "gpt2": gpt2,
    "gpt2 in bfloat16": lambda: gpt2().to(torch.bfloat16),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, not tied": lambda: llama(tie_word_embeddings=False),
    "mixtral": mixtral,
    "bert": lambda: transformers.BertForPreTraining(
        transformers.BertConfig(**SIZES, max_position_embeddings=32)
    ),
}


def assert_same(found, model) -> None:
    expected = model.state_dict()
    assert type(found) is type(model)
    assert found.state_dict().keys() == expected.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def opened(model, directory: Path):
    found, said = type(model).from_pretrained(
        directory, output_loading_info=True, dtype="auto", local_files_only=True
    )
    assert not any(said.values()), said
    return found


@pytest.mark.parametrize("limit", [5 * 10**9, 3000], ids=["one file", "sharded"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_from_pretrained_opens_the_tag(root, make, limit):
    async def save() -> None:
        async with CheckpointEngine(root, RING_8_MIB) as engine:
            await engine.create("a")
            handles.extend(await save_pretrained(engine, model, max_shard_bytes=limit))
            await engine.commit("a")
            named.update(entry.path for entry in (await engine.tags())[0].files)

    model, handles, named = make(), [], set()
    asyncio.run(save())
    assert named == {handle.path for handle in handles}
    assert ("model.safetensors" in named) == (limit > 3000)
    assert_same(opened(model, root / "a"), model)


# Stacked experts are counted whole by their own save, and so dealt out otherwise.
ALIKE = [
    (make, limit)
    for name, make in MODELS.items()
    for limit in (5 * 10**9, 3000)
    if (name, limit) != ("mixtral", 3000)
]


@pytest.mark.parametrize(("make", "limit"), ALIKE)
def test_the_files_are_those_of_the_models_own_save(root, tmp_path, make, limit):
    model = make()
    theirs = tmp_path / "theirs"
    with BlockingEngine(root, RING_8_MIB) as engine:
        engine.create("a")
        save_pretrained_blocking(engine, model, max_shard_bytes=limit)
        engine.commit("a")
    model.save_pretrained(theirs, max_shard_size=limit)
    ours = root / "a"
    files = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == {*files, ".aiockpt"}
    for name in sorted(files):
        if name.endswith(".json"):
            found, expected = (
                json.loads((place / name).read_text()) for place in (ours, theirs)
            )
            # A number of parameters that no reader looks at.
            expected.get("metadata", {}).pop("total_parameters", None)
            assert found == expected
        else:
            assert tensors_of(ours / name) == tensors_of(theirs / name)


def tensors_of(path: Path) -> object:
    """Names, dtypes, shapes and places, and all bytes; not the metadata."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert header.pop("__metadata__")["format"] == "pt"
    return header, data[end:]


def test_a_sharded_save_and_a_text_are_all_that_is_needed(root):
    model = gpt2()
    with BlockingEngine(root, RING_8_MIB) as engine:
        engine.create("a")
        engine.save_sharded(model, directory="hf", max_shard_bytes=3000)
        engine.save_bytes(model.config.to_json_string(), "hf/config.json")
        engine.commit("a")
    assert_same(opened(model, root / "a/hf"), model)


def test_a_wrapped_model_is_saved_under_its_own_names():
    model = gpt2()
    compiled = torch.compile(model)
    assert [f.path for f in pretrained_files(compiled)] == [
        f.path for f in pretrained_files(model)
    ]
    weights = pretrained_files(compiled)[0].state
    assert list(weights) == list(pretrained_files(model)[0].state)


def test_the_models_own_configuration_is_left_as_it_was():
    model = gpt2()
    before = model.config.to_json_string()
    pretrained_files(model)
    assert model.config.to_json_string() == before


@pytest.mark.parametrize("attribute", ["_hf_peft_config_loaded", "hf_quantizer"])
def test_what_only_the_models_own_save_can_do_is_refused(attribute):
    model = gpt2()
    setattr(model, attribute, True)
    with pytest.raises(InvalidArgumentError, match="save_pretrained"):
        pretrained_files(model)


def test_a_module_that_is_no_model_of_transformers_is_refused():
    with pytest.raises(InvalidArgumentError, match="save_sharded"):
        pretrained_files(torch.nn.Linear(1, 1))
