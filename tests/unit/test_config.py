"""A configuration is taken as meant, or refused by name before anything happens."""

import dataclasses
import math
from types import MappingProxyType

import pytest

import aiockpt
from aiockpt.config import GIB, MIB, EngineConfig
from aiockpt.errors import InvalidArgumentError
from aiockpt.retention import KeepEvery, KeepLast


def test_nothing_said_means_the_defaults():
    assert EngineConfig.parse(None) == EngineConfig()
    assert EngineConfig.parse({}) == EngineConfig()
    assert EngineConfig().retention == ()


def test_a_config_is_taken_as_it_is():
    config = EngineConfig(host_cache_size=0.5)

    assert EngineConfig.parse(config) is config


@pytest.mark.parametrize("block", ["aiockpt", "datastates_ckpt"])
def test_the_block_of_a_deepspeed_configuration_is_read_and_the_rest_ignored(block):
    config = {
        "train_batch_size": 8,
        block: {"host_cache_size": 16, "parser_threads": 8},
        "zero_optimization": {"stage": 1},
    }

    assert EngineConfig.parse(config) == EngineConfig(
        host_cache_size=16, parser_threads=8
    )


def test_any_mapping_will_do():
    mapping = MappingProxyType({"parser_threads": 2})

    assert EngineConfig.parse(mapping).parser_threads == 2


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("host_cache", "host_cache_size"),
        ("parser_thread", "parser_threads"),
        ("Guard", "guard"),
        ("keep", "retention"),
        (3, "guard"),
    ],
)
def test_an_unknown_key_is_refused_with_a_known_one(key, nearest):
    with pytest.raises(InvalidArgumentError, match="unknown config key") as caught:
        EngineConfig.parse({key: 1})
    assert repr(key) in str(caught.value)
    known = {field.name for field in dataclasses.fields(EngineConfig)}
    assert any(repr(name) in str(caught.value) for name in known)
    if isinstance(key, str) and key != "keep":
        assert repr(nearest) in str(caught.value)


@pytest.mark.parametrize(
    "config", [5, "text", ["a"], {"aiockpt": 3}, {"aiockpt": None}]
)
def test_what_is_no_mapping_is_refused(config):
    with pytest.raises(InvalidArgumentError):
        EngineConfig.parse(config)


@pytest.mark.parametrize(
    "size",
    [
        0, -1, -0.5, 7 * MIB / GIB, math.nan, math.inf, -math.inf, 1e300, 10**400, 2**21,
        "2", "2GiB", None, True, [2], 1j,
    ],
)  # fmt: skip
def test_a_ring_of_no_sensible_size_is_refused(size):
    with pytest.raises(InvalidArgumentError, match="host_cache_size"):
        EngineConfig(host_cache_size=size)


@pytest.mark.parametrize("size", [8 * MIB / GIB, 0.25, 1, 2.0, 1 << 20])
def test_the_ring_is_the_size_in_gib(size):
    assert EngineConfig(host_cache_size=size).ring_bytes == int(size * GIB)


def test_the_ring_is_whole_mebibytes():
    assert EngineConfig(host_cache_size=0.3).ring_bytes % MIB == 0


@pytest.mark.parametrize("threads", [0, -1, 1025, 10**30, 2.0, "4", None, True])
def test_a_wrong_number_of_threads_is_refused(threads):
    with pytest.raises(InvalidArgumentError, match="parser_threads"):
        EngineConfig(parser_threads=threads)


@pytest.mark.parametrize("guard", [1, 0, None, "yes"])
def test_guard_is_true_or_false(guard):
    with pytest.raises(InvalidArgumentError, match="guard"):
        EngineConfig(guard=guard)


@pytest.mark.parametrize(
    "retention", [KeepLast(1), None, 3, "KeepLast", [5], [KeepLast]]
)
def test_retention_is_a_sequence_of_policies(retention):
    with pytest.raises(InvalidArgumentError, match="retention"):
        EngineConfig(retention=retention)


def test_retention_takes_lists_and_tuples():
    policies = [KeepLast(2), KeepEvery(100)]

    assert list(EngineConfig(retention=policies).retention) == policies
    assert list(EngineConfig(retention=tuple(policies)).retention) == policies


def test_a_config_cannot_change_behind_the_engines_back():
    policies = [KeepLast(2)]
    config = EngineConfig(retention=policies)
    policies.clear()

    assert list(config.retention) == [KeepLast(2)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.guard = False


def test_an_engine_refuses_a_wrong_configuration_before_it_starts(root):
    with pytest.raises(InvalidArgumentError, match="host_cache_size"):
        aiockpt.CheckpointEngine(root, {"host_cachesize": 1})

    assert not root.exists()
