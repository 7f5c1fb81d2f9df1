"""States of an accelerate `Accelerator`, saved while training goes on.

    from aiockpt.integrations.accelerate import CheckpointMixin

    class MyAccelerator(CheckpointMixin, Accelerator): ...

A directory that `save_state` makes holds accelerate's own files: the stock
`load_state` takes it.
"""

__all__ = ["CheckpointMixin"]

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointNotFoundError, InvalidArgumentError
from aiockpt.integrations.background import BackgroundTags
from aiockpt.integrations.forward_state import changed_by_forward
from aiockpt.integrations.holding import hold_accelerate
from aiockpt.retention import KeepLast

if find_spec("accelerate") is None:
    text = "saving accelerate's states needs it: pip install aiockpt[transformers]"
    raise ImportError(text)
hold_accelerate()

# They save shards of their own, each by another way.
_REFUSED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "TP", "XLA")

if TYPE_CHECKING:

    class _Accelerator:
        """What the mixin uses of `accelerate.Accelerator`."""

        _models: list[Any]
        project_configuration: Any
        project_dir: str
        save_iteration: int
        distributed_type: Any

        def save_state(
            self, output_dir: Any, safe_serialization: Any, **kwargs: Any
        ) -> Any: ...
        def load_state(
            self, input_dir: Any, load_kwargs: Any, **kwargs: Any
        ) -> None: ...
        def end_training(self) -> None: ...

else:
    _Accelerator = object


class CheckpointMixin(_Accelerator):
    """An `Accelerator` whose states are captured, and written while training goes on.

    The directory of a state appears when it is complete and on stable storage, never
    before. Its parent becomes the root of an engine: `latest` and `.aiockpt` lie beside
    it. The next state waits for the one before it and raises what failed; so do
    `load_state`, `drain_checkpoints` and `end_training`. What is still under way when
    the interpreter exits is finished first.

    Hooks of `register_save_state_pre_hook` are given a temporary directory; what they
    write there is saved. On several processes each rank writes the files that are its
    own; nothing of it goes over the training group. FSDP, DeepSpeed, Megatron-LM and
    XLA are refused.

    Attributes:
        aiockpt_config: Settings of the engine, an `EngineConfig` or a mapping; may be
            set on the class or, before the first save, on the instance. Its
            `retention` gives way to the project's `total_limit`.
    """

    aiockpt_config: EngineConfig | Mapping[str, object] | None = None
    _tags: BackgroundTags | None = None

    @override
    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        **save_model_func_kwargs: Any,
    ) -> Path:
        """Captures the state and begins to publish it as `output_dir`; returns that.

        An earlier state of that name that was saved here is replaced atomically.

        Raises:
            CheckpointError: The state before failed, or this one cannot be begun.
            InvalidArgumentError: A way of training that cannot be saved here, or a
                directory that is not one of aiockpt's.
        """
        self._check_supported()
        project = self.project_configuration
        is_naming = bool(project.automatic_checkpoint_naming)
        target = self._next_state() if is_naming else Path(output_dir or "").absolute()
        if not target.name or (output_dir is None and not is_naming):
            raise InvalidArgumentError(f"{output_dir!r} does not name a directory")
        tags = self._tags_of(target.parent, project.total_limit if is_naming else None)
        models = self._models
        changing = (each for model in models for each in changed_by_forward(model))
        with tags.saving(target.name, changing=changing) as directory:
            # The name has been chosen; accelerate would choose it again.
            project.automatic_checkpoint_naming = False
            try:
                super().save_state(
                    directory, safe_serialization, **save_model_func_kwargs
                )
            finally:
                project.automatic_checkpoint_naming = is_naming
        return target

    def _next_state(self) -> Path:
        target = self._states_dir() / f"checkpoint_{self.save_iteration}"
        if target.exists():
            text = f"{target} exists: set `iteration` of the ProjectConfiguration"
            raise InvalidArgumentError(text)
        return target

    def _states_dir(self) -> Path:
        return Path(self.project_dir).absolute() / "checkpoints"

    @override
    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """Loads a state as accelerate does, once what is under way is published.

        Args:
            input_dir: The directory; None takes the newest one of automatic naming.
            load_kwargs: As for `Accelerator.load_state`.
            load_model_func_kwargs: As for `Accelerator.load_state`.

        Raises:
            CheckpointError: A state under way failed.
            CheckpointNotFoundError: There is no state of automatic naming.
        """
        self.drain_checkpoints()
        if input_dir is None and self.project_configuration.automatic_checkpoint_naming:
            input_dir = _newest(self._states_dir())
        super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)

    def drain_checkpoints(self) -> None:
        """Returns when the state under way, if any, is published.

        Raises:
            CheckpointError: It failed.
        """
        if self._tags is not None:
            self._tags.drain()

    @override
    def end_training(self) -> None:
        """Ends the trackers, drains, and ends the engine.

        Raises:
            CheckpointError: The state under way failed.
        """
        try:
            super().end_training()
        finally:
            self._close()

    def _close(self) -> None:
        tags, self._tags = self._tags, None
        if tags is not None:
            tags.close()

    def _tags_of(self, root: Path, total_limit: int | None) -> BackgroundTags:
        if self._tags is None or self._tags.root != root:
            self._close()
            config = EngineConfig.parse(self.aiockpt_config)
            if total_limit is not None:
                config = replace(config, retention=[KeepLast(total_limit)])
            self._tags = BackgroundTags(root, config)
        return self._tags

    def _check_supported(self) -> None:
        name = str(getattr(self.distributed_type, "value", self.distributed_type))
        if name in _REFUSED:
            text = f"states of {name} cannot be saved in the background here"
            raise InvalidArgumentError(text)
        if self.project_configuration.save_on_each_node:
            raise InvalidArgumentError("save_on_each_node is not supported")


def _newest(directory: Path) -> Path:
    names = [path.name for path in directory.glob("checkpoint_*") if path.is_dir()]
    numbers = [
        int(name[11:]) for name in names if re.fullmatch(r"checkpoint_\d+", name)
    ]
    if not numbers:
        raise CheckpointNotFoundError(f"{directory} has no checkpoint_N")
    return directory / f"checkpoint_{max(numbers)}"
