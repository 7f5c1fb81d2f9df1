"""Making `deepspeed.initialize` use aiockpt where its configuration asks for it."""

__all__ = ["install"]

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

from aiockpt.config import EngineConfig
from aiockpt.integrations.deepspeed.facade import BLOCKS, CheckpointEngine
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine

# Methods of a `DeepSpeedEngine` that change, move or free what it saves. Both `step`
# and the schedule of a pipeline update parameters through the first one.
_CHANGING = ("_take_model_step", "offload_states", "reload_states")
_FREEING = ("destroy",)
# That of ZeRO-3's `Init` through which parameters go back that were gathered.
_WRITING_BACK = "_partition"
# Those of a `DeepSpeedHybridEngine` that fold adapters into weights and back, or turn
# weights around for inference.
_CHANGING_HYBRID = ("generate", "eval", "train")
# What says that a `DeepSpeedEngine` changes states at times of its own.
_RESTLESS = ("zenflow", "super_offload", "is_deepcompile_enabled")
# What rank 0 does while the others wait at a barrier.
_ALONE = ("_copy_recovery_script",)


def install() -> None:
    """From now on `deepspeed.initialize` uses aiockpt if its configuration says so.

    It does where there is an `"aiockpt"` or a `"datastates_ckpt"` block that is not
    false; all other engines stay as they are. Idempotent.

    Raises:
        ImportError: There is no DeepSpeed.
    """
    try:
        module: Any = importlib.import_module("deepspeed.runtime.engine")
        zero: Any = importlib.import_module(
            "deepspeed.runtime.zero.partition_parameters"
        )
        hybrid: Any = importlib.import_module("deepspeed.runtime.hybrid_engine")
        interface: Any = importlib.import_module(
            "deepspeed.runtime.checkpoint_engine.checkpoint_engine"
        )
    except ImportError as error:
        text = "this needs DeepSpeed: pip install aiockpt[deepspeed]"
        raise ImportError(text) from error
    if hasattr(module.create_checkpoint_engine, "__wrapped__"):
        return
    interface.CheckpointEngine.register(CheckpointEngine)
    module.create_checkpoint_engine = _creating(module.create_checkpoint_engine)
    kind = module.DeepSpeedEngine
    kind.save_checkpoint = _saving(kind.save_checkpoint)
    kind.load_checkpoint = _loading(kind.load_checkpoint)
    kind.__del__ = _collecting(kind.__del__)
    kind.save_16bit_model = _telling(kind.save_16bit_model)
    partition = _partitioning(getattr(zero.Init, _WRITING_BACK))
    setattr(zero.Init, _WRITING_BACK, partition)
    for name in _ALONE:
        setattr(kind, name, _alone(getattr(kind, name)))
    for name in _CHANGING + _FREEING:
        is_freeing = name in _FREEING
        setattr(kind, name, _changing(getattr(kind, name), is_freeing=is_freeing))
    kind = hybrid.DeepSpeedHybridEngine
    for name in _CHANGING_HYBRID:
        setattr(kind, name, _changing(getattr(kind, name), is_freeing=False))


# One for all engines of a process with the same settings, and so one ring.
_engines: dict[EngineConfig, LazyCheckpointEngine] = {}


def _creating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_checkpoint_engine(config_params: Any, *args: Any, **kwargs: Any) -> Any:
        params = getattr(config_params, "_param_dict", {})
        if all(params.get(block, False) is False for block in BLOCKS):
            return original(config_params, *args, **kwargs)
        engine = LazyCheckpointEngine(
            {
                name: params[name]
                for name in BLOCKS
                if params.get(name, False) is not False
            }
        )
        return _engines.setdefault(engine.config, engine)

    return create_checkpoint_engine


def _engine_of(deepspeed_engine: Any) -> LazyCheckpointEngine | None:
    # One that was not finished, or is being collected, may have none.
    engine = getattr(deepspeed_engine, "checkpoint_engine", None)
    return engine if isinstance(engine, LazyCheckpointEngine) else None


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _engine_of(self)
        if engine is None:
            return original(self, *args, **kwargs)
        with engine.handing_over(self.module.buffers()):
            saved = original(self, *args, **kwargs)
        if _is_restless(self):
            engine.wait_staged(is_freeing=True)
        return saved

    return save_checkpoint


def _is_restless(deepspeed_engine: Any) -> bool:
    """Whether optimizer states change outside of steps: in passes, or in a process."""
    modes = (getattr(deepspeed_engine, name, None) for name in _RESTLESS)
    return any(mode() if callable(mode) else mode for mode in modes)


def _telling(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of what all ranks call, and one of them does the most of."""

    @functools.wraps(original)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _engine_of(self)
        with contextlib.nullcontext() if engine is None else engine.or_told():
            return original(self, *args, **kwargs)

    return save


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _engine_of(self)
        if engine is not None:
            # It reads `latest`, and changes what may still be being staged.
            engine.drain()
        return original(self, *args, **kwargs)

    return load_checkpoint


def _alone(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def do(self: Any, *args: Any, **kwargs: Any) -> None:
        engine = _engine_of(self)
        with contextlib.nullcontext() if engine is None else engine.alone():
            original(self, *args, **kwargs)

    return do


def _changing(original: Callable[..., Any], *, is_freeing: bool) -> Callable[..., Any]:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = _engine_of(self)
        if engine is not None:
            engine.wait_staged(is_freeing=is_freeing)
        return original(self, *args, **kwargs)

    return change


def _partitioning(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of parameters of ZeRO-3 that somebody gathered to change them.

    `save_16bit_model` does that, too: it changes none, and writes all of them back to
    where they are saved from.
    """

    @functools.wraps(original)
    def partition(
        self: Any, *args: Any, has_been_updated: bool = False, **kwargs: Any
    ) -> Any:
        # Nothing says whose parameters they are.
        for engine in _engines.values() if has_been_updated else ():
            engine.wait_staged()
        return original(self, *args, has_been_updated=has_been_updated, **kwargs)

    return partition


def _collecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collect(self: Any) -> None:
        engine = _engine_of(self)
        if engine is None:
            original(self)
            return
        # It destroys itself in whatever thread collects it, the machinery's own and one
        # that is in the middle of a save among them: it must not wait there. What was
        # handed over is committed all the same.
        self.checkpoint_engine = None
        if not engine.is_staging:
            # Else that would free page-locked memory which is being copied.
            original(self)

    return collect
