"""What is tried with the real Trainer. Run in processes of their own."""

import errno
import os
import signal
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from aiockpt.errors import CheckpointError
from aiockpt.integrations.huggingface import CheckpointMixin
from aiockpt.sync import CheckpointEngine
from aiockpt.testing.faults import Fail, Fault, inject
from integrations.processes import Hold, names, run_case

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


class Ours(CheckpointMixin, Trainer):
    aiockpt_config = {"host_cache_size": 8 / 1024, "parser_threads": 2}  # noqa: RUF012


def rows(count: int = 48) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def make(kind: type[Trainer], out: str, *callbacks, **settings: Any) -> Any:
    """Trains a model with tied weights; saves every second step."""
    transformers.set_seed(0)
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes, **special))
    usual = {
        "max_steps": 8, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=out, **{**usual, **settings})
    training = kind(
        model, arguments, train_dataset=rows(), eval_dataset=rows(8),
        callbacks=list(callbacks),
    )  # fmt: skip
    # It would print on standard output.
    training.remove_callback(transformers.PrinterCallback)
    return training


def losses(training: Any) -> list[float]:
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]


def train(kind: type[Trainer], out: str, *callbacks, resume=None, **settings) -> Any:
    training = make(kind, out, *callbacks, **settings)
    training.train(resume_from_checkpoint=resume)
    return training


class At(TrainerCallback):
    """Calls something when an event comes at a step."""

    def __init__(self, event: str, step: int, work) -> None:
        def call(_args, state, _control, **_: Any) -> None:
            if state.global_step == step:
                work()

        setattr(self, event, call)


def caught(work) -> list[str] | None:
    """The class of the error that `work` raises, and its text."""
    try:
        work()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return None


def contents(directory: str) -> dict[str, Any]:
    """What the files hold, as far as two runs must hold the same."""
    path = Path(directory)
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    return {
        "model": {
            k: v.tolist() for k, v in load_file(path / "model.safetensors").items()
        },
        "moments": optimizer["state"][0]["exp_avg"].tolist(),
        "scheduler": torch.load(path / "scheduler.pt", weights_only=True),
        "arguments": torch.load(
            path / "training_args.bin", weights_only=False
        ).learning_rate,
        "text": [
            (path / n).read_text() for n in ("config.json", "generation_config.json")
        ],
    }


def resume(out: str) -> Any:
    """Runs of the stock and of ours, each resumed by the other."""
    stock, ours = train(Trainer, f"{out}/stock"), train(Ours, f"{out}/ours")
    resumed = [
        losses(train(kind, f"{out}/{number}", resume=f"{out}/{source}/checkpoint-4"))
        for number, (kind, source) in enumerate([(Trainer, "ours"), (Ours, "stock")])
    ]
    last = [contents(f"{out}/{run}/checkpoint-8") for run in ("stock", "ours")]
    reread = GPT2LMHeadModel.from_pretrained(f"{out}/ours/checkpoint-8")
    return {
        "losses": [losses(stock), losses(ours)],
        "resumed": resumed,
        "names": [names(f"{out}/{run}") for run in ("stock", "ours")],
        "files": [names(f"{out}/{run}/checkpoint-8") for run in ("stock", "ours")],
        "is_equal": last[0] == last[1],
        "is_tied": reread.lm_head.weight is reread.transformer.wte.weight,
    }


def held(out: str) -> Any:
    """Training goes on while a checkpoint is not yet there."""
    hold, seen, at_end, scratch = Hold(), [], [], []

    class Watching(Ours):
        def _save_rng_state(self, output_dir: str) -> None:
            scratch.extend(names(output_dir))
            super()._save_rng_state(output_dir)

    def look() -> None:
        hold.wait_reached()
        seen.extend(names(out))
        hold.let_go()

    callbacks = (
        At("on_step_end", 3, look),
        At("on_train_end", 4, lambda: at_end.extend(names(out))),
    )
    with hold.publishing():
        train(Watching, out, *callbacks, max_steps=4)
    return {"seen": seen, "at_end": at_end, "scratch": sorted(set(scratch))}


def rotated(out: str, limit: int, **settings: Any) -> Any:
    """What `save_total_limit` leaves, beside the best model."""
    told = []
    for kind in (Trainer, Ours):
        where = f"{out}/{kind.__name__}"
        training = train(
            kind, where, save_total_limit=limit, eval_strategy="steps", eval_steps=2,
            metric_for_best_model="loss", learning_rate=settings.get("rate", 1e-2),
            load_best_model_at_end=settings.get("best", False),
        )  # fmt: skip
        told.append(
            {
                "names": names(where),
                "best": Path(training.state.best_model_checkpoint).name,
                "weights": training.model.lm_head.weight.sum().item(),
            }
        )
    return told


def removed_by(out: str) -> Any:
    """What the Trainer removes by itself, file by file, when it ends."""
    usual = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    usual |= {"metric_for_best_model": "loss", "learning_rate": 30.0}
    with mock.patch("transformers.trainer.shutil") as shutil:
        train(Ours, out, **usual)
    return {"names": names(out), "removed": len(shutil.rmtree.mock_calls)}


def spared(out: str) -> Any:
    """What somebody reads, and what others made, when the Trainer ends."""
    foreign = Path(out, "checkpoint-100")
    foreign.mkdir(parents=True)
    (foreign / "mine.txt").touch()
    with CheckpointEngine(out, Ours.aiockpt_config) as reader, ExitStack() as leases:

        class Read(Ours):
            def drain_checkpoints(self) -> None:
                super().drain_checkpoints()
                leases.enter_context(reader.reading("checkpoint-4"))

        usual = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
        usual |= {"metric_for_best_model": "loss", "learning_rate": 30.0}
        training = train(Read, out, max_steps=4, **usual)
    return {"names": names(out), "limit": training.args.save_total_limit}


def unsaved_part(out: str) -> Any:
    """The Trainer itself cannot save something; later it can."""

    class Failing(Ours):
        def _save_scaler(self, output_dir: str) -> None:
            raise ZeroDivisionError("no scaler")

    try:
        train(Failing, out)
    except ZeroDivisionError as error:
        told = [str(error), getattr(error, "__notes__", [])]
    work = [path for path in Path(out, ".aiockpt/work").rglob("*") if path.is_file()]
    return {"error": told, "names": names(out), "work": [f"{path}" for path in work]}


def resumed_limit(out: str) -> Any:
    """The best checkpoint of an earlier run is not rotated away."""
    usual = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2}
    usual |= {"metric_for_best_model": "loss"}

    class Worsening:
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            return {"eval_loss": float(self.state.global_step)}

    for kind in (Trainer, Ours):
        worsening = type("Worsening", (Worsening, kind), {})
        where = f"{out}/{kind.__name__}"
        train(worsening, where, max_steps=4, **usual)
        train(worsening, where, resume=f"{where}/checkpoint-4", **usual)
    return [names(f"{out}/Trainer"), names(f"{out}/Ours")]


def failed(out: str, step: int) -> Any:
    """A disk that is full when a checkpoint is written."""
    full = Fault("create", Fail(errno.ENOSPC), path="optimizer.pt", nth=step // 2)
    with inject(full):
        training = make(Ours, out, save_total_limit=1)
        error = caught(training.train)
    return {"error": error, "step": training.state.global_step, "names": names(out)}


def killed(out: str) -> Any:
    """The process dies while the second checkpoint is on its way."""
    hold = Hold()

    def die() -> None:
        hold.wait_reached()
        os.kill(os.getpid(), signal.SIGKILL)

    with hold.publishing(2):
        train(Ours, out, At("on_step_end", 5, die))


def resume_last(out: str) -> Any:
    """Goes on from what the dead process has left."""
    last = get_last_checkpoint(out)
    return {
        "last": Path(last).name,
        "losses": losses(train(Ours, out, resume=True)),
        "whole": losses(train(Trainer, f"{out}-whole")),
        "names": names(out),
    }


def wrong_step(out: str) -> Any:
    """A training that breaks while a checkpoint is on its way."""

    def break_it() -> None:
        raise ZeroDivisionError("in a step")

    try:
        train(Ours, out, At("on_step_end", 3, break_it))
    except ZeroDivisionError as error:
        return {"error": str(error), "names": names(out)}
    return None


def just_in_time(out: str) -> Any:
    """The Trainer's own way to save when it is told to end."""
    told = []
    for kind in (Trainer, Ours):
        where = f"{out}/{kind.__name__}"
        training = make(kind, where, enable_jit_checkpoint=True, save_strategy="no")
        callbacks = training.callback_handler.callbacks
        manager = next(c.jit_manager for c in callbacks if hasattr(c, "jit_manager"))
        request = At("on_step_begin", 3, manager._enable_checkpoint)
        callbacks.insert(0, request)
        training.train()
        again = train(Trainer, f"{where}-2", resume=f"{where}/checkpoint-3")
        told.append({
            "names": names(where), "files": names(f"{where}/checkpoint-3"),
            "losses": losses(again),
        })  # fmt: skip
    return told


def refused(out: str) -> Any:
    """Ways of training that cannot be saved in the background."""
    errors = []
    for setting in ({"save_on_each_node": True}, {"hub_strategy": "checkpoint"}):
        training = make(Ours, out, **setting)
        training.args.push_to_hub = "hub_strategy" in setting
        errors.append(caught(training.train))
    Path(out, "checkpoint-2").mkdir()
    Path(out, "checkpoint-2/mine.txt").touch()
    errors.append(caught(make(Ours, out).train))
    return {"errors": errors, "names": names(out)}


def two_processes(out: str) -> Any:
    """One of two processes that train together."""
    training = train(Ours, out)
    resumed = train(Trainer, f"{out}-2", resume=f"{out}/checkpoint-4")
    # Neither ends while the other still has connections to it.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if int(os.environ["RANK"]):
        raise SystemExit(0)
    return {
        "losses": losses(training), "resumed": losses(resumed),
        "files": names(f"{out}/checkpoint-8"), "names": names(out),
    }  # fmt: skip


CASES = {
    case.__name__: case
    for case in (
        resume, held, rotated, removed_by, spared, unsaved_part, resumed_limit, failed,
        killed, resume_last, wrong_step,
        just_in_time, refused, two_processes,
    )
}  # fmt: skip

if __name__ == "__main__":
    run_case(CASES)
