"""DeepSpeed's checkpoint interface over aiockpt, with or without DeepSpeed.

It blocks where the interface promises something: `commit` returns when the tag is
durable and published. `save` returns when the state has been captured.
"""

__all__ = ["BLOCKS", "CheckpointEngine", "CommitInfo"]

import atexit
import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any, Protocol

from aiockpt.config import EngineConfig
from aiockpt.errors import CheckpointError, EngineStateError
from aiockpt.integrations.deepspeed.loading import load_file
from aiockpt.integrations.deepspeed.open_tags import OpenTag, Verdict, refuse, tell
from aiockpt.integrations.deepspeed.roots import Roots
from aiockpt.loader import LoadOptions
from aiockpt.manifest import check_tag
from aiockpt.opening import TagOptions
from aiockpt.runtime import Runtime

_logger = logging.getLogger(__name__)

# What a DeepSpeed configuration calls the settings of an engine.
BLOCKS = frozenset({"aiockpt", "datastates_ckpt"})


class CommitInfo(Protocol):
    """DeepSpeed's `CheckpointCommitInfo`: a tag, and where it is to be saved."""

    tag: str
    save_dir: str
    save_latest: bool


class CheckpointEngine:
    """DeepSpeed's checkpoint engine: `create`, `save`, `load`, `commit`.

    Serves any number of directories with one ring and one set of threads, which start
    with the first use. In a job of several ranks (`torch.distributed` is initialised)
    all of them call `create` and `commit`; what fails on one raises `PeerError` on all.
    An engine that was not closed is closed when the interpreter exits.

    A tag is published as `ROOT/TAG`, and `ROOT/latest` names it then. A second one of
    the same name takes the place of the first; files that others have put into its
    directory stay there.

    Attributes:
        name: What DeepSpeed calls the engine in its log.
    """

    name = "aiockpt"

    def __init__(self, config_params: object = None) -> None:
        """Starts nothing yet.

        Args:
            config_params: A `DeepSpeedConfig`, or a mapping, with an `"aiockpt"` or
                `"datastates_ckpt"` block; an `EngineConfig`, or a mapping of its fields.

        Raises:
            InvalidArgumentError: An unknown setting, or a value out of range.
        """
        self.config = _parse(config_params)
        self._started: Roots | None = None
        self._tags: list[OpenTag] = []

    @property
    def _roots(self) -> Roots:
        if self._started is None:
            self._started = Roots(self.config)
            _running.add(self)
        return self._started

    # --- saving ---------------------------------------------------------------

    def create(self, info: str | CommitInfo) -> None:
        """Opens a tag for saving; readers see nothing of it until `commit`.

        Args:
            info: The tag; its directory is then found from the paths that are saved.
                DeepSpeed's `CheckpointCommitInfo` says it beforehand.

        Raises:
            InvalidArgumentError: It cannot be the name of a tag.
            EngineStateError: It is open already.
            StorageError: The directory cannot be written.
            PeerError: Another rank failed.
        """
        tag = self._described(info)
        if self._find(tag.tag, tag.root) is not None:
            raise EngineStateError(f"tag {tag.tag!r} is open already")
        if tag.root is not None:
            self._roots.run(self._open(tag, tag.root))
        self._tags.append(tag)

    def save(self, state_dict: object, path: str) -> None:
        """Captures `state_dict`; it is staged and written in the background.

        Tensors must not change until they are staged: a torch optimizer's `step` waits
        for that. What is saved when no tag is open is durable on return.

        Args:
            state_dict: Anything that `torch.save` takes.
            path: `ROOT/TAG/file`. Any other file is published at its path, on its own,
                by the commit of the tag that was opened last.

        Raises:
            InvalidArgumentError: `state_dict` cannot be captured.
            EngineStateError: The tag has failed; the cause is chained.
            PeerError: Another rank failed.
        """
        path = os.path.abspath(path)  # noqa: PTH100 - links stay links
        for tag in reversed(self._tags):
            root = tag.root_of(path)
            if root is not None:
                runtime = self._runtime(tag, root)
                # Also of a file that is refused: its commit, not an abort, ends the tag.
                tag.used.add(root)
                runtime.save(state_dict, path, tag=tag.tag, metadata=None)
                return
        single = self._roots.singles.save(state_dict, path)
        if self._tags:
            self._tags[-1].singles.append(single)
        else:
            self._roots.run(single.publish())

    def commit(self, info: str | CommitInfo) -> bool:
        """Publishes what was saved since `create`: it is durable on return.

        Returns:
            True, as DeepSpeed's own engines do.

        Raises:
            EngineStateError: The tag is not open.
            CheckpointError: What failed; nothing of the tag is published (but in the
                directories that a note names), and it is not open any more.
            PeerError: Another rank failed.
        """
        described = self._described(info)
        tag = self._find(described.tag, described.root)
        if tag is None:
            known = ", ".join(repr(each.tag) for each in self._tags) or "none"
            message = f"tag {described.tag!r} is not open (open: {known})"
            raise EngineStateError(f"{message}: call `create` first")
        self._tags.remove(tag)
        self._roots.run(self._commit(tag))
        return True

    def _described(self, info: str | CommitInfo) -> OpenTag:
        name, root, is_latest = info, None, True
        if not isinstance(info, str):
            name, is_latest = info.tag, info.save_latest
            root = os.path.abspath(info.save_dir)  # noqa: PTH100 - links stay links
        options = TagOptions(is_overwrite=True, adopts=True, points_latest=is_latest)
        return OpenTag(tag=check_tag(name), root=root, options=options)

    def _find(self, tag: str, root: str | None) -> OpenTag | None:
        named = [each for each in self._tags if each.tag == tag]
        exact = [each for each in named if each.root == root]
        # Whoever opened it with its directory may commit it by name.
        found = exact or (named if root is None else [])
        return found[-1] if found else None

    def _runtime(self, tag: OpenTag, root: str) -> Runtime:
        tag.raise_if_told()
        if root not in tag.runtimes:
            try:
                self._roots.run(self._tell(tag, {root}, is_complete=False))
            except CheckpointError as error:
                tag.failure, tag.is_told = error, True
                raise
        return tag.runtimes[root]

    # --- on the engine's loop -------------------------------------------------

    async def _open(self, tag: OpenTag, root: str) -> None:
        runtime = self._roots.enter(root)
        try:
            await runtime.open_tags.create(tag.tag, tag.options)
        except BaseException:
            await self._roots.leave(root)
            raise
        tag.runtimes[root] = runtime

    async def _tell(
        self, tag: OpenTag, roots: set[str], *, is_complete: bool
    ) -> Verdict:
        """Meets the other ranks, and opens the tag wherever one of them needs it."""
        word = Verdict(
            roots=frozenset(roots),
            used=frozenset(tag.used),
            has_singles=bool(tag.singles),
            is_complete=is_complete,
        )
        verdict = await tell(self._roots.ranks, tag.tag, word)
        for root in sorted(verdict.roots - tag.runtimes.keys()):
            await self._open(tag, root)
        return verdict

    async def _commit(self, tag: OpenTag) -> None:
        roots, published = self._roots, list[str]()
        try:
            verdict = await self._complete(tag)
            for root, runtime in sorted(tag.runtimes.items()):
                if root in verdict.used:
                    await runtime.commit(tag.tag)
                    published.append(root)
                else:
                    await runtime.open_tags.abort(tag.tag)
            if verdict.has_singles:
                await self._publish_singles(tag)
        except BaseException as error:
            if published:
                error.add_note(f"tag {tag.tag!r} was published in {published} before")
            await self._drop(tag)
            raise
        finally:
            for root in tag.runtimes:
                await roots.leave(root)

    async def _complete(self, tag: OpenTag) -> Verdict:
        """Agrees that all has been saved; what went wrong here is told to all."""
        tag.raise_if_told()
        try:
            if tag.failure is not None:
                raise tag.failure
            for single in tag.singles:
                await single.written()
        except CheckpointError as error:
            told = await refuse(self._roots.ranks, tag.tag, error)  # noqa: ASYNC120 - a cancellation tells more
            if told is error:
                raise
            raise told from error
        while True:
            verdict = await self._tell(tag, set(), is_complete=True)
            if verdict.is_complete:
                return verdict

    async def _publish_singles(self, tag: OpenTag) -> None:
        ranks, topic = self._roots.ranks, f"singles of {tag.tag}"
        try:
            for single in tag.singles:
                await single.publish()
        except CheckpointError as error:
            told = await ranks.object(topic, error, "publish")  # noqa: ASYNC120 - a cancellation tells more
            if told in (None, error):
                raise
            raise told from error
        await ranks.consult(topic, b"", _nothing)

    async def _drop(self, tag: OpenTag) -> None:
        """Nothing more of it is published, and nothing stays on the disk."""
        for runtime in tag.runtimes.values():
            # It is not open there if its own commit failed, or has published it.
            with contextlib.suppress(EngineStateError):
                await runtime.open_tags.abort(tag.tag)
        for single in tag.singles:
            try:
                await single.discard()
            except CheckpointError as error:
                # What went wrong before is what the caller must hear of.
                _logger.warning("a file of tag %s remains: %s", tag.tag, error)

    # --- loading --------------------------------------------------------------

    def load(self, path: str, map_location: Any = None) -> Any:
        """What was saved as `path`, by aiockpt (then it is verified) or `torch.save`.

        The file is trusted, as DeepSpeed trusts it: its pickle may run code.

        Raises:
            CheckpointNotFoundError: No such file.
            CorruptCheckpointError: It is no checkpoint, or its checksums do not hold.
            StorageError: The file system refused.
        """
        options = LoadOptions(map_location=map_location, weights_only=False)
        path = os.path.abspath(path)  # noqa: PTH100 - links stay links
        machinery = self._roots.machinery
        return self._roots.run(load_file(machinery, path, options))

    # --- what DeepSpeed asks --------------------------------------------------

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """The directory exists, with its parents, as after `os.makedirs`."""
        os.makedirs(path, exist_ok=exist_ok)  # noqa: PTH103 - what it is called for

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Whether this one of the ranks with the same state writes it: the first."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed must not commit by itself: it may, as `commit` blocks."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed has to clone what it saves: views cost their own size."""
        return False

    def set_commit_info(self, info: CommitInfo) -> None:
        """Nothing: `commit` is told what to commit."""

    def get_commit_info(self) -> CommitInfo | None:
        """None: there is nothing that DeepSpeed must commit before a step."""
        return None

    def cleanup(self) -> None:
        """Nothing is under way: `commit` has waited for it."""

    # --- the end --------------------------------------------------------------

    def close(self) -> None:
        """Ends the engine: tags that were not committed are dropped. Idempotent.

        The next use starts it again.
        """
        started, self._started = self._started, None
        _running.discard(self)
        if started is None or started.machinery.is_forked:
            return
        try:
            started.run(self._close(started))
        finally:
            started.stop()

    async def _close(self, roots: Roots) -> None:
        for tag in self._tags:
            _logger.warning("tag %s was never committed: it is dropped", tag.tag)
            await self._drop(tag)
        self._tags.clear()
        await roots.close()


async def _nothing(_words: Sequence[bytes]) -> bytes:  # noqa: ASYNC124 - as `consult` wants it
    return b""


def _parse(config_params: Any) -> EngineConfig:
    # A `DeepSpeedConfig` keeps what it was made from; without a block it says nothing.
    params = getattr(config_params, "_param_dict", None)
    if params is None:
        return EngineConfig.parse(config_params)
    return EngineConfig.parse({name: params[name] for name in BLOCKS & params.keys()})


_running: set[CheckpointEngine] = set()


@atexit.register
def _close_all() -> None:
    """Ends the engines that nobody closed, before the runtimes below them are."""
    for engine in list(_running):
        try:
            engine.close()
        except Exception:
            # The others are still to be closed.
            _logger.exception("a checkpoint engine for DeepSpeed did not end well")
