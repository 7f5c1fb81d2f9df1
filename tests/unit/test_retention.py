"""Policies choose what to keep; what none of them keeps expires, but never the newest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiockpt.errors import InvalidArgumentError
from aiockpt.retention import KeepEvery, KeepLast, expired

TAGS = st.lists(st.integers(0, 200), unique=True, max_size=20).map(
    lambda steps: [f"step-{step}" for step in sorted(steps)]
)
POLICIES = st.lists(
    st.builds(KeepLast, st.integers(1, 5)) | st.builds(KeepEvery, st.integers(1, 50)),
    max_size=3,
)


def tags(*steps: int) -> list[str]:
    return [f"step-{step}" for step in steps]


def test_with_no_policy_nothing_expires():
    assert expired(tags(1, 2, 3), []) == []


def test_keep_last_keeps_the_newest():
    assert expired(tags(1, 2, 3, 4), [KeepLast(2)]) == tags(1, 2)
    assert expired(tags(1, 2), [KeepLast(2)]) == []
    assert expired(tags(1), [KeepLast(5)]) == []


def test_keep_every_keeps_what_falls_on_the_period():
    assert expired(tags(100, 150, 200, 250, 300), [KeepEvery(100)]) == tags(150, 250)


def test_a_tag_without_a_number_is_kept_by_keep_every():
    assert expired(["best", "step-7", "step-8"], [KeepEvery(10)]) == ["step-7"]


def test_the_last_number_of_a_tag_counts():
    assert expired(["run2-step-7", "run7-step-10", "end"], [KeepEvery(10)]) == [
        "run2-step-7"
    ]


def test_a_tag_is_kept_if_any_policy_keeps_it():
    policies = [KeepLast(1), KeepEvery(100)]

    assert expired(tags(100, 150, 200, 250, 260), policies) == tags(150, 250)


def test_the_newest_tag_never_expires_whatever_a_policy_says():
    class KeepNothing:
        def keeps(self, tags):
            return set()

    assert expired(tags(1, 2, 3), [KeepNothing()]) == tags(1, 2)
    assert expired([], [KeepNothing()]) == []


@given(TAGS, POLICIES)
def test_what_expires_is_what_no_policy_keeps_in_order(names, policies):
    gone = expired(names, policies)

    kept = set().union(*(policy.keeps(names) for policy in policies))
    assert not kept.intersection(gone)
    assert gone == [tag for tag in names if tag in gone]
    assert not names or names[-1] not in gone
    # Asked again about what is left, nothing more expires.
    left = [tag for tag in names if tag not in gone]
    assert expired(left, policies) == []


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
@pytest.mark.parametrize("policy", [KeepLast, KeepEvery])
def test_a_policy_needs_a_whole_number_of_at_least_one(policy, count):
    with pytest.raises(InvalidArgumentError, match=policy.__name__):
        policy(count)
