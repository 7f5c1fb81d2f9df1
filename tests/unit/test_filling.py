"""`aiockpt.loading.filling`: tensors that are given their elements where they are."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.loading import filling
from aiockpt.loading.filling import Piece, fill

PART_BYTES = 64


@contextlib.contextmanager
def few_bytes_at_once() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The copies that are made meanwhile: what was copied to, and what from."""
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    copy = torch.Tensor.copy_

    def note(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copies.append((target, source))
        return copy(target, source)

    with (
        mock.patch.object(filling, "_PART_BYTES", PART_BYTES),
        mock.patch.object(torch.Tensor, "copy_", note),
    ):
        yield copies


@st.composite
def strided(draw: st.DrawFn, shape: list[int]) -> torch.Tensor:
    """A tensor of a shape whose elements are numbered, and have gaps between them."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    base = [0] * len(shape)
    for at, dim in enumerate(order):
        base[at] = shape[dim] * steps[dim]
    numbers = torch.arange(torch.Size(base).numel(), dtype=torch.float64).view(base)
    turned = numbers.permute([order.index(dim) for dim in range(len(shape))])
    return turned[tuple(slice(None, None, step) for step in steps)]


@given(st.data(), st.lists(st.integers(0, 7), max_size=4))
def test_a_device_takes_little_memory_beside_what_is_filled(data, shape):
    target, source = data.draw(strided(shape)), data.draw(strided(shape)) + 0.5
    target = torch.nn.Parameter(target)
    assert target.shape == source.shape
    outside = target.untyped_storage().nbytes() - target.nbytes
    before = target._version
    piece = Piece(target, source.storage_offset(), source.stride())
    with few_bytes_at_once() as copies:
        fill(piece, source.untyped_storage(), 0)
    assert torch.equal(target, source)
    assert target._version > before
    assert target.grad_fn is None
    for part, elements in copies:
        is_plain = part.is_contiguous() and elements.is_contiguous()
        assert is_plain or part.nbytes <= PART_BYTES
    # Between its elements nothing was changed: these are all halves.
    storage = torch.tensor([]).double().set_(target.untyped_storage())
    assert 8 * (storage % 1 == 0).sum() == outside


def test_what_follows_in_memory_is_copied_at_once_whatever_the_order_of_dimensions():
    source = torch.arange(4096.0).view(8, 512).t()
    target = torch.zeros(8, 512).t()
    with few_bytes_at_once() as copies:
        fill(Piece(target, 0, source.stride()), source.untyped_storage(), 0)
    assert torch.equal(target, source)
    assert len(copies) == 1


def test_on_the_host_nothing_is_cut():
    source, target = torch.arange(4096.0).view(8, 512), torch.zeros(512, 8).t()
    with few_bytes_at_once() as copies:
        fill(Piece(target, 0, source.stride()), source.untyped_storage())
    assert torch.equal(target, source)
    assert len(copies) == 1


@pytest.mark.parametrize("device", [None, 0])
def test_tensors_of_inference_are_filled(device):
    with torch.inference_mode():
        target = torch.zeros(64, 8).t()
    source = torch.arange(512.0).view(8, 64)
    with few_bytes_at_once():
        fill(Piece(target, 0, source.stride()), source.untyped_storage(), device)
    assert torch.equal(target, source)
