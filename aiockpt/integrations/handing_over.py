"""Tensors that a framework saves into a directory go to the engine instead.

Frameworks call `torch.save` and safetensors' `save_file` with a path. While they are
being handed over, these calls, from this thread and for this directory, capture the
state and return. A call that is not recognised writes its file as ever: nothing is
lost but time.
"""

__all__ = ["Save", "handed_over"]

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol


class Save(Protocol):
    """Takes what would have been written to `path`, relative to the directory."""

    def __call__(
        self, state: object, path: str, metadata: Mapping[str, str] | None
    ) -> object:
        """Captures `state` before it returns."""
        ...


# Where the two functions are looked up by those who call them.
_SAVES = (
    ("torch", "save"),
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("accelerate.utils.other", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
)
# The state, and where it goes.
_NUM_ARGUMENTS = 2
# The functions are the process's: one thread at a time puts others in their place. It
# may do so again within (a trainer's save that calls an accelerator's).
_replacing = threading.RLock()


@contextlib.contextmanager
def handed_over(directory: str, save: Save) -> Generator[None]:
    """Within the block, what this thread saves below `directory` goes to `save`."""
    with _replacing, contextlib.ExitStack() as originals:
        for name, attribute in _SAVES:
            module: Any = sys.modules.get(name)
            original = getattr(module, attribute, None)
            if original is not None:
                instead = _instead(original, directory, save, is_torch=name == "torch")
                setattr(module, attribute, instead)
                originals.callback(setattr, module, attribute, original)
        yield


def _instead(
    original: Callable[..., Any], directory: str, save: Save, *, is_torch: bool
) -> Callable[..., Any]:
    owner = threading.get_ident()

    def hand_over(*args: Any, **options: Any) -> Any:
        is_known = len(args) == _NUM_ARGUMENTS and not options.keys() - {"metadata"}
        relative = _relative(args[1], directory) if is_known else None
        if threading.get_ident() != owner or relative is None:
            return original(*args, **options)
        # The engine tells containers by the name; these two do not look at it.
        if relative.endswith(".safetensors") == is_torch:
            return original(*args, **options)
        return save(args[0], relative, options.get("metadata"))

    return hand_over


def _relative(path: Any, directory: str) -> str | None:
    if not isinstance(path, str | os.PathLike):
        return None
    relative = os.path.relpath(os.fspath(path), directory)
    return None if relative.startswith(os.pardir) else relative
