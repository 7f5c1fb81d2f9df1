"""The demonstration's text: the same on each call, and read as the position says."""

from hypothesis import given
from hypothesis import strategies as st

from aiockpt.demo.text import Batches, standard_library

CORPUS = bytes(range(256)) * 4


def batches(seed=0):
    return Batches(CORPUS, context=9, batch_size=4, seed=seed)


def test_the_standard_library_is_the_same_text_each_time_and_as_long_as_asked():
    text = standard_library(10_000)
    assert len(text) == 10_000
    assert text == standard_library(20_000)[:10_000]
    assert b"def " in text


def test_an_epoch_reads_no_window_twice():
    source = batches()
    num_batches = len(CORPUS) // 10 // 4
    rows = [tuple(row.tolist()) for _ in range(num_batches) for row in source.next()]
    windows = {tuple(CORPUS[at : at + 10]) for at in range(0, len(CORPUS) - 9, 10)}
    assert len(set(rows)) == num_batches * 4
    assert set(rows) <= windows


def test_the_order_differs_between_seeds_and_between_epochs():
    one, other = batches(seed=1), batches(seed=2)
    first = one.next()
    assert not first.equal(other.next())
    while one.state_dict()["epoch"] == 0:
        following = one.next()
    assert not first.equal(following)


@given(taken=st.integers(0, 120), ahead=st.integers(0, 60), seed=st.integers(0, 9))
def test_what_follows_a_position_is_the_same_wherever_it_is_loaded(taken, ahead, seed):
    source = batches()
    for _ in range(taken):
        source.next()
    position = source.state_dict()
    resumed = batches(seed)
    for _ in range(ahead):
        resumed.next()
    resumed.load_state_dict(position)
    for _ in range(30):  # More than an epoch.
        assert resumed.next().equal(source.next())


def test_a_position_does_not_move_with_its_source():
    source = batches()
    position = source.state_dict()
    source.next()
    assert position["taken"] == 0
