"""What a forward pass may change is copied, and nothing else is."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from aiockpt.integrations.forward_state import changed_by_forward, with_copies

SMALL, LARGE = 64 * 1024 // 4, 64 * 1024 // 4 + 1


def test_small_tensors_are_copied_and_large_ones_stay_the_callers():
    state = {"small": torch.zeros(SMALL), "large": torch.zeros(LARGE)}

    taken = with_copies(state)
    for tensor in state.values():
        tensor.add_(1)

    assert taken["small"].sum() == 0
    assert taken["large"] is state["large"]


def test_tensors_that_are_known_to_change_are_copied_whatever_their_size():
    large = torch.zeros(LARGE)

    taken = with_copies({"view": large[1:]}, changing=[large])
    large.add_(1)

    assert taken["view"].sum() == 0
    assert taken["view"].shape == (LARGE - 1,)


def test_buffers_and_embeddings_that_are_scaled_change_in_a_forward_pass():
    plain, scaled = torch.nn.Embedding(9, 4), torch.nn.Embedding(9, 4, max_norm=0.1)
    bag, norm = torch.nn.EmbeddingBag(9, 4, max_norm=0.1), torch.nn.BatchNorm1d(4)
    module = torch.nn.ModuleList([plain, scaled, bag, norm])
    state = {key: value.clone() for key, value in module.state_dict().items()}

    for part in (plain, scaled, bag):
        part(torch.arange(9).view(3, 3))
    norm(torch.randn(5, 4))

    found = {tensor.data_ptr() for tensor in changed_by_forward(module)}
    for key, tensor in module.state_dict().items():
        has_changed = not torch.equal(tensor, state[key])
        assert (tensor.data_ptr() in found) == has_changed, key


def test_what_shared_memory_shares_it_still():
    row = torch.arange(6.0)
    state = {"row": row, "again": row, "part": row[2:4], "turned": row.view(2, 3).T}

    taken = with_copies(state)
    taken["row"][2] = 9

    assert taken["again"][2] == taken["part"][0] == taken["turned"][2, 0] == 9
    assert row[2] == 2


def test_the_shape_of_the_state_and_its_aliases_stay():
    inner = OrderedDict(w=torch.ones(2))
    inner._metadata = {"version": 1}
    cycle: list[object] = [inner, (inner, 3), "text"]
    cycle.append(cycle)

    taken = with_copies({"a": cycle, "b": inner})

    assert taken["a"][0] is taken["b"] is taken["a"][1][0]
    assert taken["a"][3] is taken["a"]
    assert taken["a"][1:3] == [(taken["b"], 3), "text"]
    assert type(taken["b"]) is OrderedDict
    assert taken["b"]._metadata == {"version": 1}
    assert taken["b"] is not inner


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.empty(0),
    ],
    ids=["parameter", "gradient", "sparse", "meta", "conjugate", "empty"],
)
def test_a_tensor_of_another_kind_is_left_as_it_is(tensor):
    assert with_copies([tensor])[0] is tensor


def test_objects_of_other_classes_are_left_as_they_are():
    class Mapping(dict):
        pass

    other = Mapping(w=torch.ones(2))

    assert with_copies({"other": other})["other"] is other


@pytest.mark.parametrize("order", [("part", "whole"), ("whole", "part")])
def test_two_storages_at_one_address_are_two(order):
    numbers = np.arange(100, dtype=np.int64)
    made = {
        "part": torch.from_numpy(numbers[:5]),
        "whole": torch.from_numpy(numbers),
    }
    taken = with_copies({name: made[name] for name in order})
    assert taken["part"].tolist() == numbers[:5].tolist()
    assert taken["whole"].tolist() == numbers.tolist()
