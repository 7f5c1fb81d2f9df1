"""What is tried with the real Lightning. Run in processes of their own."""

import atexit
import contextlib
import errno
import logging
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from aiockpt.errors import CheckpointError
from aiockpt.integrations.lightning import AiockptCheckpointIO
from aiockpt.testing.faults import Fail, Fault, inject
from integrations.late_staging import late_staging
from integrations.processes import Hold, names, run_case

torch.set_num_threads(1)
warnings.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

FAULTS = contextlib.ExitStack()  # that last as long as the process
IO = {"host_cache_size": 8 / 1024, "parser_threads": 2}


class Module(lightning.LightningModule):
    """Normalised, so that its forward pass changes tensors, too."""

    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.BatchNorm1d(16)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), norm, torch.nn.Linear(16, 1)
        )
        self.losses: list[float] = []

    def training_step(self, batch, _index):
        loss = self.net(batch[0]).pow(2).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data() -> torch.utils.data.DataLoader:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(rows), batch_size=4
    )


def trainer(io, out, *callbacks, steps=8, devices=1, **settings) -> lightning.Trainer:
    """Saves every second step."""
    settings = {"save_top_k": -1, "filename": "{step}", **settings}
    saving = ModelCheckpoint(dirpath=out, every_n_train_steps=2, **settings)
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        plugins=[io] if io else [],
        callbacks=[saving, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )


def fit(io, out, *callbacks, ckpt=None, **settings) -> list[float]:
    lightning.seed_everything(0)
    module = Module()
    training = trainer(io, out, *callbacks, **settings)
    training.fit(module, data(), ckpt_path=ckpt, weights_only=False)
    return module.losses


class At(Callback):
    """Calls something after a step."""

    def __init__(self, step, work) -> None:
        self._step, self._work = step, work

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            self._work()


def caught(work) -> list[str] | None:
    """The class of the error that `work` raises, and its text."""
    try:
        work()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return None


def content(path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def resume(out: str, devices: int = 1) -> Any:
    """Runs of the stock and of ours, each resumed by the other."""
    where = {"devices": devices}
    stock = fit(None, f"{out}/stock", **where)
    ours = fit(AiockptCheckpointIO(IO), f"{out}/ours", **where)
    resumed = [
        fit(io, f"{out}/{number}", ckpt=f"{out}/{source}/step=4.ckpt", **where)
        for number, (io, source) in enumerate(
            [(None, "stock"), (None, "ours"), (AiockptCheckpointIO(IO), "stock")]
        )
    ]
    files = [content(f"{out}/{run}/step=4.ckpt") for run in ("stock", "ours")]
    parts = [
        [*file["state_dict"].items(), *file["optimizer_states"][0]["state"][0].items()]
        for file in files
    ]
    return {
        "losses": [stock, ours],
        "resumed": resumed,
        "names": [names(f"{out}/stock"), names(f"{out}/ours")],
        "equal": all(
            a == b and torch.equal(v, w) for (a, v), (b, w) in zip(*parts, strict=True)
        ),
        "keys": [sorted(file) for file in files],
    }


def held(out: str) -> Any:
    """Training goes on while a file is not yet at its path."""
    hold, seen = Hold(), []

    def look() -> None:
        hold.wait_reached()
        seen.append([n for n in names(out) if not n.startswith(".")])
        hold.let_go()

    with inject(Fault("rename", hold, path="step=2")):
        fit(AiockptCheckpointIO(IO), out, At(7, look))
    return {"seen": seen[0], "names": names(out)}


def kept(out: str, **settings: Any) -> Any:
    """What is left of a run, and which of it loads."""
    fit(AiockptCheckpointIO(IO), out, **settings)
    steps = {n: content(f"{out}/{n}")["global_step"] for n in names(out)}
    links = [n for n in names(out) if os.path.islink(f"{out}/{n}")]
    return {"steps": steps, "links": links}


def failed(out: str, step: int) -> Any:
    """A disk that is full when the checkpoint of a step is written."""
    full = Fault("create", Fail(errno.ENOSPC), path=f"step={step}")
    last, io = [], AiockptCheckpointIO(IO)
    with inject(full):
        count = [At(n, lambda n=n: last.append(n)) for n in range(1, 9)]
        # What was saved at step 4 has ended, well or not, when the next save comes.
        ended = At(5, io._drain)
        error = caught(lambda: fit(io, out, *count, ended, save_top_k=1))
    left = names(out)
    again = fit(io, f"{out}/again", save_top_k=1)
    return {
        "error": error, "last": last[-1], "left": left,
        "again": names(f"{out}/again"), "steps": len(again),
    }  # fmt: skip


def wrong_step(out: str) -> Any:
    """A training that breaks while a checkpoint is on its way."""

    def break_it() -> None:
        raise ZeroDivisionError("in a step")

    hold = Hold()
    threading.Thread(target=lambda: (hold.wait_reached(), hold.let_go())).start()
    with inject(Fault("rename", hold, path="step=2")):
        try:
            fit(AiockptCheckpointIO(IO), out, At(3, break_it))
        except ZeroDivisionError as error:
            return {"error": str(error), "names": names(out)}
    return None


def remove_early(out: str) -> Any:
    """A file is removed before it is there, and one that a failed save follows."""
    io, hold = AiockptCheckpointIO(IO), Hold()
    with inject(Fault("rename", hold, path="a.ckpt")):
        io.save_checkpoint({"a": 1}, f"{out}/a.ckpt")
        io.remove_checkpoint(f"{out}/a.ckpt")
        hold.let_go()
        io.teardown()
    return names(out)


def load_pending(out: str) -> Any:
    """A file is loaded before it is there: it comes when somebody waits for it."""
    hold = Hold()

    class Watched(AiockptCheckpointIO):
        def _drain(self) -> None:
            hold.let_go()
            super()._drain()

    io = Watched(IO)
    with inject(Fault("rename", hold, path="a.ckpt")):
        io.save_checkpoint({"a": torch.arange(3)}, f"{out}/a.ckpt")
        loaded = io.load_checkpoint(f"{out}/a.ckpt", weights_only=None)
        io.teardown()
    return loaded["a"].tolist()


class Mean(torch.nn.Module):
    """Keeps a sum of what it has seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, rows):
        return rows - self.seen.add_(rows.mean(0))


def forward_meanwhile(out: str, kind: str, width: int, *, wait: bool) -> Any:
    """A forward pass changes what a layer remembers before it is staged."""
    io, hold = AiockptCheckpointIO(IO), Hold()
    norm = {"norm": torch.nn.BatchNorm1d, "mean": Mean}[kind](width)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    with hold.staging():
        io.save_checkpoint({"state_dict": norm.state_dict()}, f"{out}/a.ckpt")
        if wait:
            threading.Thread(
                target=lambda: (hold.wait_reached(), hold.let_go())
            ).start()
            io.wait_staged()
        norm(torch.randn(4, width))
        hold.let_go()
        error = caught(io.teardown)
    saved = content(f"{out}/a.ckpt")["state_dict"] if error is None else None
    is_before = saved and all(torch.equal(before[key], saved[key]) for key in before)
    return {"error": error, "is_before": is_before}


class Wide(Module):
    """Its weights are too large to be copied at a save."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 2048), torch.nn.Linear(2048, 16)
        )

    def validation_step(self, batch, _index):
        self.log("loss", self.net(batch[0]).pow(2).mean())


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "ema of epochs": lambda: EMAWeightAveraging(
        decay=0.5, update_every_n_steps=100, update_starting_at_epoch=0
    ),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
}


def averages(out: str, kind: str, **saving: Any) -> Any:
    """The files of the stock and of ours where a callback averages behind saves."""
    late = late_staging((AiockptCheckpointIO, "_drain"))
    files = []
    for io, run, context in (
        (None, "stock", contextlib.nullcontext()),
        (AiockptCheckpointIO(IO), "ours", late),
    ):
        lightning.seed_everything(0)
        callbacks = [
            AVERAGES[kind](),
            ModelCheckpoint(f"{out}/{run}", "{step}", save_top_k=-1, **saving),
        ]
        training = lightning.Trainer(
            max_epochs=4, limit_train_batches=3, limit_val_batches=1, accelerator="cpu",
            logger=False, plugins=[io] if io else [], callbacks=callbacks,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        )  # fmt: skip
        with context:
            training.fit(Wide(), data(), data())
        files.append({n: content(f"{out}/{run}/{n}") for n in names(f"{out}/{run}")})
    stock, ours = files
    return {
        "names": [list(stock), list(ours)],
        "differing": [name for name in stock if not _same(stock[name], ours[name])],
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same tensors, however deep."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return all(map(_same, one, other))
    return True


def bad_calls(out: str) -> Any:
    """Each is refused, and nothing is changed."""
    io = AiockptCheckpointIO(IO)
    Path(out, "directory").mkdir()
    calls = [
        lambda: io.save_checkpoint({}, "s3://bucket/a.ckpt"),
        lambda: io.load_checkpoint("https://host/a.ckpt"),
        lambda: io.save_checkpoint({}, f"{out}/directory"),
        lambda: io.save_checkpoint({}, f"{out}/a.ckpt", storage_options={}),
        lambda: io.save_checkpoint({"f": lambda: 0}, f"{out}/a.ckpt"),
        lambda: io.load_checkpoint(f"{out}/none.ckpt"),
    ]
    errors = [caught(call) for call in calls]
    io.teardown()
    io.teardown()
    return {"errors": errors, "names": names(out)}


def after_fit(out: str) -> Any:
    """Saved when nothing will call `teardown`: the process just ends."""
    module = Module()
    training = trainer(AiockptCheckpointIO(IO), f"{out}/fit")
    training.fit(module, data())
    hold = Hold()
    FAULTS.enter_context(inject(Fault("rename", hold, path="after.ckpt")))
    training.save_checkpoint(f"{out}/after.ckpt")
    # Later than this, the process is ending.
    atexit.register(hold.let_go)
    return names(out)


def two_devices(out: str) -> Any:
    """As `resume`, told by the first of two processes."""
    facts = resume(out, devices=2)
    kept_one = fit(AiockptCheckpointIO(IO), f"{out}/one", devices=2, save_top_k=1)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise SystemExit(0)
    return {**facts, "one": names(f"{out}/one"), "steps": len(kept_one)}


CASES = {
    case.__name__: case
    for case in (
        resume, held, kept, failed, wrong_step, remove_early, load_pending,
        forward_meanwhile, averages, bad_calls, after_fit, two_devices,
    )
}  # fmt: skip

if __name__ == "__main__":
    run_case(CASES)
