"""An optimizer's step waits until what it would change has been copied."""

import asyncio
import threading

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from aiockpt import CheckpointEngine, EngineStateError, StorageError, guard, saver
from aiockpt.machinery import Machinery
from aiockpt.staging import host
from aiockpt.testing.faults import Delay, Fault, inject
from equality import assert_same_state
from gates import (
    LIMIT_S,
    RING_8_MIB,
    either,
    happened,
    held,
    in_thread,
    noted_waits,
    num_held,
    turns,
)
from optimizers import NAMES, training

every_optimizer = pytest.mark.parametrize("name", NAMES)


@every_optimizer
async def test_a_step_begins_only_when_all_has_been_staged(name, root, monkeypatch):
    trained = training(name)
    expected = trained.state_now()
    waits = noted_waits(monkeypatch)
    order: list[str] = []

    def step() -> None:
        trained.optimizer.step()
        order.append("stepped")

    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save(trained.state(), "model.pt")
            stepping = in_thread(step)
            await gate.reached()
            await either(waits, stepping)
            assert not stepping.done()
            assert_same_state(trained.state(), expected)
            order.append("opened")
        await happened(stepping)
        await engine.commit("a")
        assert_same_state(await engine.load("model.pt"), expected)
    stepping.result()
    assert order == ["opened", "stepped"]
    changed = trained.state()["model"]["0.weight"]
    assert not torch.equal(changed, expected["model"]["0.weight"])


@every_optimizer
async def test_the_plain_loop_save_step_commit_keeps_the_values_at_save(name, root):
    trained = training(name)
    expected = {}
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        for tag in ("a", "b", "c"):
            await engine.create(tag)
            expected[tag] = trained.state_now()
            await engine.save(trained.state(), "model.pt")
            trained.optimizer.step()
            await engine.commit(tag)
        for tag, state in expected.items():
            assert_same_state(await engine.load("model.pt", tag=tag), state)
            assert_same_state(torch.load(root / tag / "model.pt"), state)


async def test_what_is_staged_waits_for_no_file_to_be_opened(root):
    file_system = threading.Event()
    slow = Delay(lambda: file_system.wait(LIMIT_S))
    async with CheckpointEngine(root, RING_8_MIB) as engine:
        await engine.create("a")
        with inject(Fault("create", slow, path="model.pt")) as injection:
            await engine.save({"w": torch.ones(1000)}, "model.pt")
            try:
                async with asyncio.timeout(LIMIT_S / 4):
                    await engine.staged("a")
            finally:
                file_system.set()
            await engine.commit("a")
        assert injection.spoiled
        assert_same_state(await engine.load("model.pt"), {"w": torch.ones(1000)})


async def test_a_step_waits_for_every_engine_of_the_process(tmp_path, monkeypatch):
    trained = training("SGD-loop")
    waits = noted_waits(monkeypatch)
    async with CheckpointEngine(tmp_path / "idle"):
        async with CheckpointEngine(tmp_path / "busy") as busy:
            await busy.create("a")
            with held(monkeypatch, host, "_fill") as gate:
                await busy.save({"unrelated": torch.ones(3)}, "model.pt")
                await gate.reached()
                stepping = in_thread(trained.optimizer.step)
                await either(waits, stepping)
                assert not stepping.done()
            await happened(stepping)
            await busy.commit("a")


async def test_the_time_that_a_step_was_held_is_reported_as_stall(root, monkeypatch):
    trained = training("SGD-loop")
    async with CheckpointEngine(root) as engine:
        guard_gate = engine._runtime._machinery.gate
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            handle = await engine.save(trained.state(), "model.pt")
            before_s = handle._save.stall_s
            stepping = in_thread(trained.optimizer.step)
            await gate.reached()
            # Later it would find that nothing is being staged any more.
            while not (stepping.done() or num_held(guard_gate)):
                await turns(1)
        await happened(stepping)
        report = await engine.commit("a")
    assert before_s < handle._save.stall_s == report.stall_s


async def test_wait_staged_is_the_guard_for_other_code(root, monkeypatch):
    tensor = torch.zeros(4)
    waits = noted_waits(monkeypatch)

    def change() -> None:
        engine.wait_staged()
        tensor.fill_(1)

    async with CheckpointEngine(root) as engine:
        engine.wait_staged()
        await engine.create("a")
        with held(monkeypatch, host, "_fill") as gate:
            await engine.save({"w": tensor}, "model.pt")
            await gate.reached()
            changing = in_thread(change)
            await happened(waits)
            assert torch.equal(tensor, torch.zeros(4))
        await happened(changing)
        await engine.commit("a")
        assert torch.equal((await engine.load("model.pt"))["w"], torch.zeros(4))
    assert torch.equal(tensor, torch.ones(4))


async def test_wait_staged_does_not_block_the_engines_own_thread(root):
    raised: list[EngineStateError] = []

    def observer(_: object) -> None:
        try:
            engine.wait_staged()
        except EngineStateError as error:
            raised.append(error)

    async with CheckpointEngine(root, observers=[observer]) as engine:
        await engine.create("a")
        await engine.save({}, "model.pt")
        await engine.commit("a")
    assert "the engine's own thread" in str(raised[0])


async def test_a_step_goes_on_when_the_save_fails(root, monkeypatch):
    trained = training("AdamW-fused")
    waits = noted_waits(monkeypatch)

    def fail(*_: object) -> None:
        raise StorageError(5, "injected", "f")

    monkeypatch.setattr(saver, "make_plan", fail)
    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        with held(monkeypatch, saver, "make_plan"):
            await engine.save(trained.state(), "model.pt")
            stepping = in_thread(trained.optimizer.step)
            await happened(waits)
        await happened(stepping)
        with pytest.raises(StorageError, match="injected"):
            await engine.commit("a")


async def test_a_save_that_is_refused_at_the_last_moment_holds_nobody(
    root, monkeypatch
):
    trained = training("SGD-loop")

    def refuse(*_: object) -> None:
        raise EngineStateError("injected")

    async with CheckpointEngine(root) as engine:
        await engine.create("a")
        with monkeypatch.context() as refusing:
            refusing.setattr(Machinery, "spawn", refuse)
            with pytest.raises(EngineStateError, match="injected"):
                await engine.save(trained.state(), "model.pt")
        trained.optimizer.step()
        await engine.save(trained.state(), "model.pt")
        await engine.commit("a")


@pytest.mark.parametrize("end", ["abort", "aclose"])
async def test_a_step_goes_on_when_the_tag_is_dropped(end, root, monkeypatch):
    trained = training("SGD-foreach")
    waits = noted_waits(monkeypatch)
    engine = CheckpointEngine(root)
    await engine.create("a")
    async with asyncio.TaskGroup() as group:
        with held(monkeypatch, saver, "make_plan") as gate:
            await engine.save(trained.state(), "model.pt")
            stepping = in_thread(trained.optimizer.step)
            await happened(waits)
            await gate.reached()
            if end == "abort":
                group.create_task(engine.abort("a"))
        if end == "aclose":
            with pytest.raises(EngineStateError, match="'a'"):
                await engine.aclose()
    await happened(stepping)
    await engine.aclose()


async def test_there_is_one_hook_and_it_forgets_an_engine_that_is_closed(root):
    async with CheckpointEngine(root):
        before = dict(torch_optimizer._global_optimizer_pre_hooks)
        gates = guard._hook.gates
        async with CheckpointEngine(f"{root}-2"):
            assert len(guard._hook.gates) == len(gates) + 1
    assert len(guard._hook.gates) == len(gates) - 1
    assert dict(torch_optimizer._global_optimizer_pre_hooks) == before
