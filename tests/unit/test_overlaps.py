"""`aiockpt.loading.overlaps`: which targets would be given two values at one place."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from aiockpt.loading import overlaps as overlaps_module
from aiockpt.loading.overlaps import Source, overlaps, shares_elements

NUM_ELEMENTS = 40


def places(tensor: Tensor) -> list[int]:
    """The address of each element."""
    steps = [
        [index * step * tensor.itemsize for index in range(size)]
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    return [tensor.data_ptr() + sum(way) for way in itertools.product(*steps)]


@st.composite
def view_of(draw: st.DrawFn, base: Tensor) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    steps = [draw(st.integers(0, 9)) for _ in shape]
    last = sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    if 0 in shape or last >= len(base):
        return base[:0]
    return base.as_strided(shape, steps, draw(st.integers(0, len(base) - last - 1)))


def is_disjoint(*tensors: Tensor) -> bool:
    found = [place for tensor in tensors for place in places(tensor)]
    return len(found) == len(set(found))


def pairs(targets: list[Tensor], source_of=Source) -> list[tuple[str, str, bool]]:
    return list(map(tuple, overlaps(dict(zip("abcdef", targets)), source_of)))  # noqa: B905 - fewer targets


@given(view_of(torch.zeros(NUM_ELEMENTS)))
def test_a_tensor_that_has_an_element_twice_is_known(tensor):
    assert shares_elements(tensor) == (not is_disjoint(tensor))


@given(st.lists(view_of(torch.zeros(NUM_ELEMENTS)).filter(is_disjoint), max_size=6))
def test_targets_with_an_element_in_common_are_found_and_no_others(targets):
    found = pairs(targets)
    assert bool(found) == (not is_disjoint(*targets))
    for key, other, is_certain in found:
        assert is_certain
        named = [targets["abcdef".index(name)] for name in (key, other)]
        assert not is_disjoint(*named)


@given(st.lists(view_of(torch.zeros(NUM_ELEMENTS)).filter(is_disjoint), max_size=6))
def test_a_record_that_is_laid_over_memory_fills_any_views_of_it(targets):
    sources = {
        key: Source("0", tensor.storage_offset() + 7, tensor.stride())
        for key, tensor in zip("abcdef", targets)  # noqa: B905 - fewer targets
    }
    assert pairs(targets, sources.__getitem__) == []


def test_the_same_memory_is_fine_for_the_same_elements_only():
    target = torch.zeros(4, 6).t()
    own = Source("0", 0, (4, 1))
    assert pairs([target, target.detach()], lambda _: own) == []
    for other in (own._replace(origin="1"), own._replace(offset=1)):
        sources = {"a": own, "b": other}
        assert pairs([target, target], sources.__getitem__) == [("b", "a", True)]
    assert pairs([target, target.t()], lambda _: own) == [("b", "a", True)]


def test_a_target_that_conjugates_what_it_is_given_is_another():
    target = torch.zeros(4, dtype=torch.complex64)
    for source in (Source("0", 0, (1,)), Source(b"pickle")):
        assert pairs([target.conj(), target.conj()], lambda _, own=source: own) == []
        found = pairs([target, target.conj()], lambda _, own=source: own)
        assert found == [("b", "a", True)]


def test_one_memory_in_two_storages_is_one_memory():
    array = torch.zeros(6).numpy()
    one, other = torch.from_numpy(array), torch.from_numpy(array[3:])
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert pairs([one, other]) == [("b", "a", True)]
    assert pairs([one[:3], other]) == []


def test_elements_of_different_sizes_are_compared_by_their_bytes():
    base = torch.zeros(8, dtype=torch.int64)
    words = base.view(torch.int32)
    assert pairs([words[::4], words[1::4], base[1::2]]) == []
    assert pairs([words[::4], words[3::4], base[1::2]]) == [("b", "c", True)]


@pytest.mark.parametrize("num_columns", [2, 3, 7])
def test_blocks_of_columns_take_few_marks_however_large(num_columns, monkeypatch):
    monkeypatch.setattr(overlaps_module, "_MAX_MARKS", 3000)
    matrix = torch.zeros(300, num_columns * 512)
    blocks = list(matrix.split(512, dim=1))
    assert pairs(blocks[:6]) == []
    assert pairs([*blocks[:2], matrix[:, :1024]]) == [("c", "a", True)]


def test_what_takes_too_many_marks_is_compared_within_one_step(monkeypatch):
    monkeypatch.setattr(overlaps_module, "_MAX_MARKS", 1000)
    matrix = torch.zeros(500, 513)
    assert pairs([matrix[:, :512], matrix[:, 512]]) == []
    assert pairs([matrix[:, :512], matrix[:, 511]]) == [("b", "a", False)]
    # These share nothing: the first ends before the second begins.
    halves = [matrix[:250, :512], matrix[250:, :512], matrix[100:400, 512:]]
    assert pairs(halves) == [("b", "a", False)]
    # Each row of the second goes on in the next row of the first.
    across = matrix.as_strided((499, 200), (513, 1), 400)
    assert pairs([matrix[:, :1], across]) == [("b", "a", False)]
    # No step in common.
    assert pairs([matrix[0, ::2], matrix[:, 1]]) == [("b", "a", False)]


def test_what_only_follows_each_other_takes_no_marks(monkeypatch):
    monkeypatch.setattr(overlaps_module, "_MAX_MARKS", 0)
    assert pairs(list(torch.zeros(99).split([40, 0, 33, 26]))) == []


def test_one_that_takes_too_many_marks_counts_as_sharing(monkeypatch):
    tensor = torch.zeros(60).as_strided((7, 3), (2, 3))
    odd = torch.zeros(60).as_strided((2, 3), (3, 2))
    assert shares_elements(tensor)
    assert not shares_elements(odd)
    monkeypatch.setattr(overlaps_module, "_MAX_MARKS", 7)
    assert shares_elements(odd)


def test_wrappers_are_compared_by_what_they_wrap():
    one, other, third = (torch.zeros(3) for _ in range(3))
    target = TwoTensor(one, other)
    own = Source(b"pickle")
    assert pairs([target, TwoTensor(one, other)], lambda _: own) == []
    # Once for each of the parts.
    assert set(pairs([target, TwoTensor(one, other)])) == {("b", "a", True)}
    found = pairs([target, TwoTensor(other, one)], lambda _: own)
    assert set(found) == {("b", "a", True)}
    assert pairs([target, TwoTensor(third, third)]) == []


def test_what_has_no_memory_of_this_kind_is_left_out():
    sparse = torch.eye(3).to_sparse()
    meta = torch.zeros(3, device="meta")
    empty = torch.zeros(3)[:0]
    for target in (sparse, meta, empty):
        assert pairs([target, target]) == []
