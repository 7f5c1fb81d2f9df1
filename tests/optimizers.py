"""Small models under training, with each kind of optimizer step that torch has."""

import copy
import itertools
from typing import Any, NamedTuple

import torch

# How a step changes tensors: one by one, in lists, or in one kernel.
FORMS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
KINDS = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
}
NAMES = ["-".join(names) for names in itertools.product(KINDS, FORMS)]


class Training(NamedTuple):
    """A model that has been trained for a step, and is ready for the next."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """What a checkpoint of it holds; its tensors are the live ones."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def state_now(self) -> dict[str, Any]:
        """The same with tensors of its own."""
        return copy.deepcopy(self.state())


def training(name: str) -> Training:
    """A training with the optimizer of one of `NAMES`."""
    kind, form = name.split("-")
    make, settings = KINDS[kind]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    optimizer = make(model.parameters(), **settings, **FORMS[form])
    model(torch.ones(4, 8)).sum().backward()
    # The first step makes the optimizer's state.
    optimizer.step()
    return Training(model, optimizer)
