"""Functions of frameworks that change tensors without an optimizer's step."""

__all__ = ["hold", "hold_accelerate"]

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from aiockpt.guard import before_change


def hold(
    owner: Any, *names: str, where: Callable[..., bool] = lambda *_, **__: True
) -> None:
    """From now on methods of a class wait until all that is being staged has been.

    Args:
        owner: The class.
        names: Its methods; versions differ, and those that it has not are left out.
        where: Given what the method is: whether that call changes anything.

    Idempotent.
    """
    for name in names:
        found = inspect.getattr_static(owner, name, None)
        original = getattr(owner, name, None)
        if original is None or hasattr(original, "_aiockpt_holds"):
            continue
        held: Any = _held(original, where)
        setattr(
            owner, name, staticmethod(held) if isinstance(found, staticmethod) else held
        )


def _held(
    original: Callable[..., Any], where: Callable[..., bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if where(*args, **kwargs):
            before_change()
        return original(*args, **kwargs)

    vars(method)["_aiockpt_holds"] = True
    return method


def hold_accelerate() -> None:
    """Holds back what optimizers of accelerate, and so of the Trainer, do beside `step`.

    Schedule-free ones rewrite the weights where they change between training and
    evaluation; LOMO's change them in the backward pass.
    """
    wrapper = importlib.import_module("accelerate.optimizer").AcceleratedOptimizer
    for name in ("train", "eval"):
        hold(wrapper, name, where=functools.partial(_is_rewriting, name))
    hold(importlib.import_module("accelerate").Accelerator, "lomo_backward")


def _is_rewriting(name: str, wrapper: Any) -> bool:
    optimizer = wrapper.optimizer
    if not (hasattr(optimizer, name) or hasattr(optimizer, "optimizer")):
        return False
    # The Trainer asks before each step for what is so already.
    is_training = name == "train"
    groups = getattr(optimizer, "param_groups", [])
    return not all(group.get("train_mode") is is_training for group in groups)
