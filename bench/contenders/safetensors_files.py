"""safetensors, whose files hold flat dicts of tensors and nothing else."""

__all__ = ["Plain", "Synced"]

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from bench.contenders.base import (
    Contender,
    Done,
    Saving,
    State,
    copied_into,
    sync_tree,
)

_FILE = "model.safetensors"


class Synced(Contender):
    """`save_file`, then fsync; `load_file`, which maps the file."""

    name = "safetensors + fsync"
    durability = "fsync of file and directory"
    package = "safetensors"
    modules = ("safetensors.torch",)
    is_lazy = True

    @override
    def save(self, state: State, tag: str) -> Saving:
        from safetensors.torch import save_file

        save_file(dict(state), self.directory / tag / _FILE)
        sync_tree(self.directory / tag)
        return Done()

    @override
    def load(
        self,
        tag: str,
        like: Mapping[str, torch.Tensor],
        *,
        is_in_place: bool = False,
        keys: list[str] | None = None,
    ) -> Mapping[str, Any]:
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = self.directory / tag / _FILE
        device = str(next(iter(like.values())).device)
        if keys is not None:
            with safe_open(path, framework="pt", device=device) as file:
                return {key: file.get_tensor(key).clone() for key in keys}
        state: dict[str, torch.Tensor] = load_file(path, device=device)
        return copied_into(state, like) if is_in_place else state


class Plain(Synced):
    """`save_file` as it is."""

    name = "safetensors"
    durability = "none: in the page cache, a power cut may take it"

    @override
    def save(self, state: State, tag: str) -> Saving:
        from safetensors.torch import save_file

        save_file(dict(state), self.directory / tag / _FILE)
        return Done()
