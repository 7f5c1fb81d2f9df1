"""Whatever a state looks like: parts of it, and targets for it, get what was saved."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from aiockpt import sync
from aiockpt.errors import InvalidArgumentError
from aiockpt.testing.strategies import state_dicts

settings.register_profile(
    "files", suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
files = settings(settings.get_profile("files"), max_examples=60)


def flat(state, prefix=()):
    """The tensors of a state by the way to them."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {}
    found = {}
    for name, value in items:
        found |= flat(value, (*prefix, name))
    return found


def raw(tensor):
    return (
        tensor.dtype,
        tuple(tensor.shape),
        bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()),
    )


def saved(path: Path, state, suffix):
    path = path / f"file{suffix}"
    if suffix == ".aiockpt":
        sync.save(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".aiockpt"])
@files
@given(state=state_dicts(), data=st.data())
def test_any_choice_of_keys_gives_these_tensors_and_no_others(
    tmp_path, suffix, state, data
):
    path = saved(tmp_path, state, suffix)
    wanted = list(flat(torch.load(path)).values())
    try:
        with sync.open(path) as file:
            keys = file.keys
            one_by_one = [file.tensor(key) for key in keys]
    except InvalidArgumentError:
        # Two tensors whose key paths are spelt alike cannot be told apart by them.
        assume(False)
    assert list(map(raw, one_by_one)) == list(map(raw, wanted))
    chosen = data.draw(st.sets(st.sampled_from(keys))) if keys else set()
    found = sync.load(path, keys=sorted(chosen))
    assert {key: raw(tensor) for key, tensor in found.items()} == {
        key: raw(tensor)
        for key, tensor in zip(keys, wanted, strict=True)
        if key in chosen
    }


def emptied(state):
    """The same structure with tensors of the same kind that hold something else."""
    if isinstance(state, torch.Tensor):
        return torch.ones_like(state)
    if isinstance(state, dict):
        return {name: emptied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(emptied, state))
    return state


@pytest.mark.parametrize("suffix", [".pt", ".aiockpt"])
@files
@given(state=state_dicts())
def test_any_state_fills_one_of_the_same_structure(tmp_path, suffix, state):
    path = saved(tmp_path, state, suffix)
    wanted = flat(torch.load(path))
    into = emptied(state)
    targets = flat(into)
    addresses = {way: target.data_ptr() for way, target in targets.items()}
    try:
        result = sync.load(path, into=into)
    except InvalidArgumentError as error:
        if "two tensors" not in str(error):
            raise
        assume(False)
    assert {way: raw(target) for way, target in targets.items()} == {
        way: raw(tensor) for way, tensor in wanted.items()
    }
    assert {way: target.data_ptr() for way, target in targets.items()} == addresses
    assert {way: raw(tensor) for way, tensor in flat(result).items()} == {
        way: raw(tensor) for way, tensor in wanted.items()
    }
