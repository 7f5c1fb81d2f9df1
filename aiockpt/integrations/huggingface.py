"""Checkpoints of the Hugging Face Trainer, saved while training goes on.

    from aiockpt.integrations.huggingface import CheckpointMixin

    class MyTrainer(CheckpointMixin, Trainer): ...

The directories `checkpoint-N` hold the Trainer's own files, each with its content:
the stock Trainer resumes from them, and `from_pretrained` loads them.
"""

__all__ = ["CheckpointMixin"]

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, InvalidArgumentError
from aiockpt.integrations.background import BackgroundTags
from aiockpt.integrations.forward_state import changed_by_forward
from aiockpt.integrations.holding import hold_accelerate

try:
    from transformers.trainer_callback import ExportableState
except ImportError as missing:
    text = (
        "the Trainer's checkpoints need transformers: pip install aiockpt[transformers]"
    )
    raise ImportError(text) from missing

hold_accelerate()

# A name that `TrainerState.load_from_json` and the stock Trainer look for.
_STATE_NAME = "trainer_state.json"
# Left in the checkpoint's directory by the Trainer's just-in-time saving, beforehand.
_SENTINEL_NAME = "checkpoint-is-incomplete.txt"

if TYPE_CHECKING:

    class _Trainer:
        """What the mixin uses of `transformers.Trainer`."""

        args: Any
        state: Any
        control: Any
        model: Any
        accelerator: Any
        callback_handler: Any
        hp_search_backend: Any
        is_deepspeed_enabled: bool
        is_fsdp_enabled: bool

        def train(self, *args: Any, **kwargs: Any) -> Any: ...
        def store_flos(self) -> None: ...
        def save_model(self, output_dir: str, _internal_call: Any) -> None: ...
        def _get_output_dir(self, trial: Any) -> str: ...
        def _save_checkpoint(self, model: Any, trial: Any) -> None: ...
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None: ...
        def _save_scaler(self, output_dir: str) -> None: ...
        def _save_rng_state(self, output_dir: str) -> None: ...
        def _finalize_training(self, *args: Any, **kwargs: Any) -> Any: ...

else:
    _Trainer = object


class CheckpointMixin(_Trainer):
    """A Trainer whose checkpoints are captured, and then written while it trains.

    A directory `checkpoint-N` appears when it is complete and on stable storage, never
    before. The next checkpoint waits for the one before it, and raises what failed; so
    does the end of `train`. With `save_total_limit`, old checkpoints go once a newer
    one is published, but for those that are being read (`CheckpointEngine.reading`);
    directories that the stock Trainer wrote are neither counted nor removed, and never
    replaced.

    On several processes each rank writes the files that are its own; nothing of it
    goes over the training group. FSDP, DeepSpeed (which has an engine of its own in
    `aiockpt.integrations.deepspeed`) and pushes of checkpoints to the Hub are refused.

    Attributes:
        aiockpt_config: Settings of the engine, an `EngineConfig` or a mapping; may be
            set on the class or, before training, on the instance. Its `retention`
            gives way to `save_total_limit`.
    """

    aiockpt_config: EngineConfig | Mapping[str, object] | None = None
    _tags: BackgroundTags | None = None
    _limit: "_TotalLimit | None" = None

    @override
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as ever; on return every checkpoint is published.

        Raises:
            CheckpointError: A checkpoint could not be saved.
            InvalidArgumentError: A way of training that cannot be saved here.
        """
        self._check_supported()
        try:
            result = super().train(*args, **kwargs)
        except BaseException as error:
            try:
                self._close()
            except CheckpointError as lost:
                error.add_note(f"and a checkpoint was lost: {lost}")
            raise
        self._close()
        return result

    def drain_checkpoints(self) -> None:
        """Returns when the checkpoint under way, if any, is published.

        Raises:
            CheckpointError: It failed.
        """
        if self._tags is not None:
            self._tags.drain()

    def _close(self) -> None:
        tags, self._tags = self._tags, None
        if tags is not None:
            tags.close()

    def _check_supported(self) -> None:
        text = "this Trainer saves in the background and cannot use {}"
        if self.is_deepspeed_enabled:
            other = "DeepSpeed: use aiockpt.integrations.deepspeed with a stock Trainer"
            raise InvalidArgumentError(text.format(other))
        if self.is_fsdp_enabled:
            raise InvalidArgumentError(text.format("FSDP"))
        if self.args.save_on_each_node:
            raise InvalidArgumentError(text.format("save_on_each_node"))
        if self.args.push_to_hub and self.args.hub_strategy != "end":
            raise InvalidArgumentError(text.format("hub_strategy other than 'end'"))

    # --- what the Trainer calls -----------------------------------------------

    @override
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        tag = f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        root = Path(self._get_output_dir(trial=trial))
        tags = self._tags_of(root.absolute())
        if self.args.should_save:
            _remove_sentinel(root / tag)
        with tags.saving(tag, changing=changed_by_forward(self.model)) as directory:
            self.save_model(directory, _internal_call=True)
            self._note_best(root, tag)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(directory)
                self._save_scaler(directory)
                self._save_rng_state(directory)
            if self.args.should_save:
                self._save_state(directory)

    def _note_best(self, root: Path, tag: str) -> None:
        state = self.state
        best = f"checkpoint-{state.best_global_step}"
        # The tag before this one has been published, this one will be.
        if state.best_global_step and (best == tag or (root / best).exists()):
            state.best_model_checkpoint = f"{root / best}"
        if self._limit is not None and state.best_model_checkpoint:
            self._limit.best = Path(state.best_model_checkpoint).name

    def _save_state(self, directory: str) -> None:
        exported = [*self.callback_handler.callbacks, self.control]
        for part in exported:
            if not isinstance(part, ExportableState):
                continue
            states, name = self.state.stateful_callbacks, type(part).__name__
            if isinstance(states[name], list):
                states[name].append(part.state())
            else:
                states[name] = part.state()
        self.state.save_to_json(f"{directory}/{_STATE_NAME}")

    @override
    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # It loads the best checkpoint, removes some, and ends the training.
        self.drain_checkpoints()
        best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
        if best and limit == 1 and self.args.should_save and self._tags:
            others = [tag for tag in self._tags.tags() if tag != Path(best).name]
            self._tags.delete(tag for tag in others if tag.startswith("checkpoint-"))
        # What is left is being read, or none of ours: it would go file by file.
        self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _tags_of(self, root: Path) -> BackgroundTags:
        if self._tags is None or self._tags.root != root:
            self._close()
            config = EngineConfig.parse(self.aiockpt_config)
            limit = self.args.save_total_limit
            if limit is not None and limit > 0:
                self._limit = _TotalLimit(limit)
                config = replace(config, retention=[self._limit])
            self._tags = BackgroundTags(root, config)
        return self._tags


@dataclass(slots=True)
class _TotalLimit:
    """Keeps what the Trainer's `save_total_limit` keeps.

    Attributes:
        limit: How many, at least one.
        best: The tag of the best model so far, which stays; so does the newest.
    """

    limit: int
    best: str | None = None

    def keeps(self, tags: Sequence[str]) -> set[str]:
        """See `RetentionPolicy.keeps`."""
        kept = {tags[-1]} | ({self.best} & set(tags) if self.best else set())
        for tag in reversed(tags):
            if len(kept) < self.limit:
                kept.add(tag)
        return kept


def _remove_sentinel(directory: Path) -> None:
    """Makes way for a tag where just-in-time saving announced it."""
    with contextlib.suppress(OSError):
        (directory / _SENTINEL_NAME).unlink()
        directory.rmdir()
