"""A training loop without asyncio: it saves, dies if told to, and resumes.

python plain_loop.py runs/plain --die-at 25
python plain_loop.py runs/plain
"""

import argparse
import os
import signal

import torch

from aiockpt.errors import CheckpointNotFoundError
from aiockpt.sync import CheckpointEngine


def main() -> None:
    """Trains for 40 steps, with a checkpoint after every tenth."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root")
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--die-at", type=int, help="kill the process after a step")
    options = arguments.parse_args()

    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with CheckpointEngine(options.root, {"host_cache_size": 0.25}) as engine:
        done = resume(engine, model, optimizer)
        print(f"starts after step {done}")
        pending = None
        for step in range(done + 1, options.steps + 1):
            loss = train_step(model, optimizer, step)
            if step % 10 == 0:
                # The one before has had ten steps' time to reach the disk.
                if pending is not None:
                    engine.commit(pending)
                pending = begin_save(engine, model, optimizer, step)
            if step == options.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if pending is not None:
            engine.commit(pending)
            print(f"step {options.steps}: loss {loss:.6f}")


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> float:
    """The loss before the step; `optimizer.step` waits for what is being staged."""
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
    loss = (model(rows) - rows.flip(1)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def begin_save(
    engine: CheckpointEngine,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> str:
    """Captures the state; it is written while training goes on."""
    tag = f"step-{step}"
    # A run that died may have published it.
    engine.create(tag, overwrite=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    engine.save({**state, "step": step}, "training.pt")
    return tag


def resume(
    engine: CheckpointEngine, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Steps done so far: those of the newest checkpoint that is sound."""
    if engine.latest() is None:
        return 0
    try:
        _, [state] = engine.load_latest_valid("training.pt")
    except CheckpointNotFoundError as error:
        raise SystemExit(f"no checkpoint is sound: {error}") from error
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


if __name__ == "__main__":
    main()
