"""An asyncio trainer: rollouts, updates, evaluation and checkpoints on one loop.

    python rl_trainer.py runs/rl

Players walk a plane towards a goal and hand their episodes to the learner (REINFORCE).
Meanwhile an evaluation runs, checkpoints are written, and a heartbeat measures how
long the loop was away. Run it again, and it goes on from the latest checkpoint.
"""

import argparse
import asyncio
import math
import time
from dataclasses import dataclass, field

import torch
from torch.distributions import Categorical

import aiockpt

MOVES = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.1], [0.0, -0.1]])
HORIZON = 20
BEAT_S = 0.005


@dataclass
class Learner:
    """The policy and all that a checkpoint needs of it."""

    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    updates: int = 0
    gaps_s: list[float] = field(default_factory=list)

    @classmethod
    def fresh(cls, width: int) -> "Learner":
        """A policy that knows nothing."""
        torch.manual_seed(0)
        hidden = torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 4)
        policy = torch.nn.Sequential(*hidden)
        return cls(policy, torch.optim.Adam(policy.parameters(), lr=1e-2))

    def state(self) -> dict[str, object]:
        """References only: `save` captures them."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load(self, state: dict) -> None:
        """The reverse of `state`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


@torch.no_grad()
async def walk(policy: torch.nn.Module, *, is_greedy: bool = False) -> list[tuple]:
    """One episode: places, moves and rewards."""
    place = torch.rand(2) * 2 - 1
    episode = []
    for _ in range(HORIZON):
        logits = policy(place)
        move = logits.argmax() if is_greedy else Categorical(logits=logits).sample()
        following = (place + MOVES[move]).clamp(-1, 1)
        episode.append((place, move, (place.norm() - following.norm()).item()))
        place = following
        # A real environment would be awaited here.
        await asyncio.sleep(0)
    return episode


async def play(policy: torch.nn.Module, episodes: asyncio.Queue) -> None:
    """Hands over episodes for ever."""
    while True:
        await episodes.put(await walk(policy))


async def evaluate(learner: Learner) -> None:
    """Prints, now and then, how far a greedy player comes."""
    while True:
        walks = [await walk(learner.policy, is_greedy=True) for _ in range(8)]
        gained = sum(reward for episode in walks for *_, reward in episode) / len(walks)
        print(f"update {learner.updates}: greedy players come {gained:.2f} nearer")
        await asyncio.sleep(0.2)


async def beat(gaps_s: list[float]) -> None:
    """Notes by how much the loop was late."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(BEAT_S)
        gaps_s.append(time.perf_counter() - start - BEAT_S)


def update(learner: Learner, episodes: list[list[tuple]]) -> None:
    """One step; it waits until a checkpoint's tensors have been copied."""
    places, moves, rewards = zip(*(s for e in episodes for s in e), strict=True)
    gains = torch.tensor(rewards).view(len(episodes), HORIZON)
    to_come = gains.flip(1).cumsum(1).flip(1).flatten()
    chosen = Categorical(logits=learner.policy(torch.stack(places)))
    advantage = to_come - to_come.mean()
    loss = -(chosen.log_prob(torch.stack(moves)) * advantage).mean()
    learner.optimizer.zero_grad()
    loss.backward()
    learner.optimizer.step()
    learner.updates += 1


async def learn(
    learner: Learner,
    episodes: asyncio.Queue,
    engine: aiockpt.CheckpointEngine,
    updates: int,
) -> None:
    """Updates the policy; every tenth update makes a checkpoint behind its back."""
    async with asyncio.TaskGroup() as commits:
        while learner.updates < updates:
            update(learner, [await episodes.get() for _ in range(8)])
            if learner.updates % 10 == 0:
                tag = f"update-{learner.updates}"
                await engine.create(tag, overwrite=True)
                await engine.save(learner.state(), "learner.pt")
                commits.create_task(commit(engine, tag))


async def commit(engine: aiockpt.CheckpointEngine, tag: str) -> None:
    """Publishes a checkpoint while the learner goes on."""
    report = await engine.commit(tag)
    print(
        f"{tag}: {report.nbytes / 1e6:.1f} MB in {report.total_s * 1e3:.0f} ms, "
        f"of which the learner was held {report.stall_s * 1e3:.2f} ms"
    )


async def train(root: str, updates: int, width: int) -> None:
    """Runs everything on one loop."""
    learner = Learner.fresh(width)
    episodes: asyncio.Queue = asyncio.Queue(maxsize=16)
    config = aiockpt.EngineConfig(host_cache_size=0.25, retention=[aiockpt.KeepLast(3)])
    async with aiockpt.CheckpointEngine(root, config) as engine:
        if await engine.latest() is not None:
            tag, [state] = await engine.load_latest_valid("learner.pt")
            learner.load(state)
            print(f"goes on from {tag}")
        async with asyncio.TaskGroup() as group:
            others = [
                *(group.create_task(play(learner.policy, episodes)) for _ in range(4)),
                group.create_task(evaluate(learner)),
                group.create_task(beat(learner.gaps_s)),
            ]
            await learn(learner, episodes, engine, updates)
            for task in others:
                task.cancel()
    gaps = sorted(learner.gaps_s) or [math.nan]
    print(
        f"loop gap: median {gaps[len(gaps) // 2] * 1e3:.2f} ms, "
        f"longest {gaps[-1] * 1e3:.2f} ms in {len(gaps)} beats"
    )


def main() -> None:
    """Reads the command line."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("root")
    arguments.add_argument("--updates", type=int, default=100)
    arguments.add_argument("--width", type=int, default=512)
    options = arguments.parse_args()
    asyncio.run(train(options.root, options.updates, options.width))


if __name__ == "__main__":
    main()
