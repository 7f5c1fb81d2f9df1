"""What is tried with the real accelerate. Run in processes of their own."""

import errno
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # accelerate imports it late; each child would
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors.torch import load_file

from aiockpt.errors import CheckpointError
from aiockpt.integrations.accelerate import CheckpointMixin
from aiockpt.integrations.background import BackgroundTags
from aiockpt.testing.faults import Fail, Fault, inject
from integrations.late_staging import late_staging
from integrations.processes import Hold, names, run_case

torch.set_num_threads(1)
warnings.filterwarnings("ignore")


class Ours(CheckpointMixin, Accelerator):
    aiockpt_config = {"host_cache_size": 8 / 1024, "parser_threads": 2}  # noqa: RUF012


class Counter:
    """Something of the user's that is saved as well."""

    count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Training:
    """A model with tied weights, dropout and statistics."""

    def __init__(self, kind: type[Accelerator], **settings: Any) -> None:
        set_seed(0)
        self.accelerator = kind(cpu=True, **settings)
        first, last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        last.weight = first.weight
        parts = (first, torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.2), last)
        model = torch.nn.Sequential(*parts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        prepared = self.accelerator.prepare(model, optimizer, schedule)
        self.model, self.optimizer, self.schedule = prepared
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = self.model(torch.randn(4, 8)).pow(2).mean()
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.counter.count += 1
            losses.append(loss.item())
        return losses


def caught(work) -> list[str] | None:
    """The class of the error that `work` raises, and its text."""
    try:
        work()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return None


def resume(out: str, *, safe: bool) -> Any:
    """States of ours and of the stock, each loaded by the other."""
    ours, stock = Training(Ours), Training(Accelerator)
    ours.steps(3)
    place = ours.accelerator.save_state(f"{out}/ours/3", safe)
    next_losses = ours.steps(3)
    ours.accelerator.save_state(f"{out}/ours/6", safe)
    ours.accelerator.end_training()
    set_seed(0)
    stock = Training(Accelerator)
    stock.steps(3)
    stock.accelerator.save_state(f"{out}/stock", safe)
    resumed = []
    for kind, source in ((Accelerator, "ours/3"), (Ours, "stock")):
        training = Training(kind)
        training.accelerator.load_state(f"{out}/{source}")
        resumed.append([training.steps(3), training.counter.count])
    return {
        "losses": next_losses, "resumed": resumed, "place": str(place),
        "files": [names(f"{out}/ours/3"), names(f"{out}/stock")],
    }  # fmt: skip


class ScheduleFree(torch.optim.SGD):
    """Has other weights for training than for evaluation."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self._set(is_training=True, factor=1)

    def _set(self, *, is_training: bool, factor: float) -> None:
        for group in self.param_groups:
            if group.get("train_mode") is not is_training:
                group["train_mode"] = is_training
                for parameter in group["params"]:
                    parameter.data.mul_(factor)

    def train(self) -> None:
        self._set(is_training=True, factor=-1)

    def eval(self) -> None:
        self._set(is_training=False, factor=-1)


def modes(out: str) -> Any:
    """What is saved, and whether it is being staged, as an optimizer's mode changes."""
    accelerator = Ours(cpu=True)
    model = torch.nn.Linear(512, 512)
    model, optimizer = accelerator.prepare(model, ScheduleFree(model.parameters()))
    told = {}
    for before, after in (
        ("train", "train"), ("train", "eval"), ("eval", "eval"), ("eval", "train")
    ):  # fmt: skip
        getattr(optimizer, before)()
        weight, name = model.weight.detach().clone(), f"{before}-{after}"
        with late_staging((BackgroundTags, "drain")):
            accelerator.save_state(f"{out}/{name}")
            getattr(optimizer, after)()
            is_staging = accelerator._tags._runtime._machinery.gate.is_staging
            accelerator.drain_checkpoints()
        saved = load_file(f"{out}/{name}/model.safetensors")["weight"]
        told[name] = [torch.equal(saved, weight), is_staging]
    accelerator.end_training()
    return told


def held(out: str) -> Any:
    """Training goes on, and nothing is seen, while a state is on its way."""
    scratch: list[str] = []

    class Peeking(Accelerator):
        def save_state(self, output_dir: str, *args: Any, **kwargs: Any) -> None:
            super().save_state(output_dir, *args, **kwargs)
            scratch.extend(names(output_dir))

    class Watched(CheckpointMixin, Peeking):
        aiockpt_config = Ours.aiockpt_config

    training, hold = Training(Watched), Hold()
    with hold.publishing():
        training.accelerator.save_state(f"{out}/first")
        training.steps(2)
        hold.wait_reached()
        before = names(out)
        hold.let_go()
        training.accelerator.drain_checkpoints()
    after = names(out)
    training.accelerator.end_training()
    return {"before": before, "after": after, "scratch": scratch}


def forward_meanwhile(out: str) -> Any:
    """A forward pass changes statistics before they are staged."""
    training, hold = Training(Ours), Hold()
    before = {k: v.clone() for k, v in training.model.state_dict().items()}
    with hold.staging():
        training.accelerator.save_state(f"{out}/state")
        training.model(torch.randn(4, 8))
        hold.let_go()
        training.accelerator.end_training()
    saved = load_file(f"{out}/state/model.safetensors")
    return all(torch.equal(before[key], saved[key]) for key in saved)


def load_pending(out: str) -> Any:
    """A state is loaded before it is there: it comes when somebody waits for it."""
    hold = Hold()

    class Watched(Ours):
        def drain_checkpoints(self) -> None:
            hold.let_go()
            super().drain_checkpoints()

    training = Training(Watched)
    with hold.publishing():
        training.accelerator.save_state(f"{out}/state")
        training.counter.count = 7
        training.accelerator.load_state(f"{out}/state")
        training.accelerator.end_training()
    return training.counter.count


def named(out: str) -> Any:
    """States that accelerate names, of which two are kept."""
    project = ProjectConfiguration(out, automatic_checkpoint_naming=True, total_limit=2)
    training = Training(Ours, project_config=project)
    places = []
    for _ in range(4):
        training.steps(1)
        places.append(training.accelerator.save_state().name)
    training.steps(5)
    training.accelerator.load_state()
    project.iteration = 3
    again = caught(training.accelerator.save_state)
    training.accelerator.end_training()
    return {
        "places": places, "names": names(f"{out}/checkpoints"),
        "count": training.counter.count, "again": again,
    }  # fmt: skip


def failed(out: str) -> Any:
    """A disk that is full for one state."""
    training = Training(Ours)
    accelerator = training.accelerator
    accelerator.save_state(f"{out}/good")
    accelerator.drain_checkpoints()
    with inject(Fault("create", Fail(errno.ENOSPC), path="random_states")):
        first = caught(lambda: accelerator.save_state(f"{out}/bad"))
        second = caught(lambda: accelerator.save_state(f"{out}/next"))
    accelerator.save_state(f"{out}/last")
    accelerator.end_training()
    return {"errors": [first, second], "names": names(out)}


def at_exit(out: str) -> Any:
    """A state that nobody waits for: the process just ends."""
    training = Training(Ours)
    training.accelerator.save_state(f"{out}/state")


def refused(out: str) -> Any:
    """Each is refused, and nothing is changed."""
    training = Training(Ours)
    accelerator = training.accelerator
    errors = [caught(accelerator.save_state)]
    Path(out, "mine").mkdir()
    Path(out, "mine/file.txt").touch()
    errors.append(caught(lambda: accelerator.save_state(f"{out}/mine")))
    accelerator.project_configuration.save_on_each_node = True
    errors.append(caught(lambda: accelerator.save_state(f"{out}/a")))
    accelerator.project_configuration.save_on_each_node = False
    accelerator.project_configuration.automatic_checkpoint_naming = True
    accelerator.project_configuration.project_dir = out
    errors.append(caught(accelerator.load_state))
    return {"errors": errors, "names": names(out)}


def two_processes(out: str) -> Any:
    """One of two processes that train together."""
    ours = Training(Ours)
    ours.steps(3)
    ours.accelerator.save_state(f"{out}/ours")
    losses = ours.steps(3)
    ours.accelerator.drain_checkpoints()
    stock = Training(Accelerator)
    stock.accelerator.load_state(f"{out}/ours")
    resumed = stock.steps(3)
    stock.accelerator.save_state(f"{out}/stock")
    # Which ends the process group: a state is on its way without it.
    ours.accelerator.save_state(f"{out}/last")
    ours.accelerator.end_training()
    if not ours.accelerator.is_main_process:
        assert losses == resumed
        raise SystemExit(0)
    files = [names(f"{out}/{state}") for state in ("ours", "last", "stock")]
    return {"losses": losses, "resumed": resumed, "files": files}


CASES = {
    case.__name__: case
    for case in (
        resume,
        held,
        modes,
        forward_meanwhile,
        load_pending,
        named,
        failed,
        at_exit,
        refused,
        two_processes,
    )
}

if __name__ == "__main__":
    run_case(CASES)
