"""Models of `transformers` in a tag, laid out as `save_pretrained` does it.

`AutoModel.from_pretrained(f"{root}/{tag}")` then opens the tag, as does every other
reader of that layout. Needs transformers 5.
"""

__all__ = ["pretrained_files", "save_pretrained", "save_pretrained_blocking"]

import copy
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers.core_model_loading import revert_weight_conversion

from aiockpt import engine, sync
from aiockpt.errors import InvalidArgumentError
from aiockpt.formats.plain import PlainBytes
from aiockpt.sharding import MAX_SHARD_BYTES, WeightsFile, sharded
from aiockpt.weights import Weights, weights_of


async def save_pretrained(
    engine: engine.CheckpointEngine,
    model: torch.nn.Module,
    *,
    directory: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tag: str | None = None,
) -> list[engine.SaveHandle]:
    """Captures a model's weights and configuration as files of an open tag.

    Args:
        engine: Saves them.
        model: A `PreTrainedModel`, also inside `DistributedDataParallel` or compiled.
        directory: Where in the tag the files go; by default the tag itself.
        max_shard_bytes: Most bytes of tensors in one file.
        tag: An open tag; by default the one that was created last.

    Raises:
        InvalidArgumentError: Only `model.save_pretrained` can save this model, or a
            path was saved before.
        EngineStateError: No such open tag, or it has failed.

    If cancelled: the call does not suspend, so it is done or was never made.
    """
    files = pretrained_files(
        model, directory=directory, max_shard_bytes=max_shard_bytes
    )
    return [
        await engine.save(file.state, file.path, tag=tag, metadata=file.metadata)
        for file in files
    ]


def save_pretrained_blocking(
    engine: sync.CheckpointEngine,
    model: torch.nn.Module,
    *,
    directory: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tag: str | None = None,
) -> list[sync.SaveHandle]:
    """`save_pretrained` for an engine that blocks."""
    files = pretrained_files(
        model, directory=directory, max_shard_bytes=max_shard_bytes
    )
    return [
        engine.save(file.state, file.path, tag=tag, metadata=file.metadata)
        for file in files
    ]


def pretrained_files(
    model: torch.nn.Module,
    *,
    directory: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[WeightsFile]:
    """The weights as `sharded` deals them out, then the configurations.

    Weights that the model holds in another form than its published checkpoints
    (experts stacked into one tensor) are copied into that form.

    Raises:
        InvalidArgumentError: Only `model.save_pretrained` can save this model.
    """
    model = _unwrapped(model)
    _check(model)
    weights = weights_of(model)
    published = Weights(_as_published(model, weights.tensors), weights.ties)
    prefix = f"{directory.rstrip('/')}/" if directory else ""
    return [
        *sharded(published, directory=directory, max_shard_bytes=max_shard_bytes),
        *(
            WeightsFile(f"{prefix}{name}", PlainBytes.of(text), None)
            for name, text in _configurations(model).items()
        ),
    ]


def _unwrapped(model: Any) -> Any:
    # By hand: the function of that name in transformers looks at installed packages,
    # which is file work on the caller's loop.
    while True:
        if isinstance(model, DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod  # noqa: SLF001
        else:
            return model


def _check(model: Any) -> None:
    if not hasattr(model, "config"):
        kind = type(model).__name__
        message = f"{kind} is no model of transformers: `save_sharded` takes any module"
        raise InvalidArgumentError(message)
    for attribute, what in {
        "_hf_peft_config_loaded": "with adapters",
        "hf_quantizer": "that is quantized",
    }.items():
        if getattr(model, attribute, None):
            message = f"a model {what} is saved by its own `save_pretrained` only"
            raise InvalidArgumentError(message)


def _as_published(
    model: Any, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return {name: tensor.contiguous() for name, tensor in reverted.items()}


def _configurations(model: Any) -> dict[str, str]:
    """The texts of the files that say what the weights belong to."""
    # Copies: what is noted for the file is none of the model's business.
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    texts = {"config.json": config.to_json_string()}
    if model.can_generate() and model.generation_config is not None:
        generation = copy.deepcopy(model.generation_config)
        # How to compile is about this machine, and no JSON.
        generation.compile_config = None
        texts["generation_config.json"] = generation.to_json_string()
    return texts
