"""What the programs with DeepSpeed share: trainers, and how they tell what is wrong."""

import gc
import json
import random
import shutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from models import Experts, Language, batch, pipeline

# A rank that raises leaves the others in a collective call.
PATIENCE = timedelta(seconds=45)
OURS = {"aiockpt": {"host_cache_size": 0.05, "parser_threads": 2}}


def config(cell, **more):
    zero = {"stage": cell.get("stage", 0)}
    if cell.get("offload") in {"optimizer", "parameters"}:
        zero["offload_optimizer"] = {"device": "cpu"}
    if cell.get("offload") == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 200
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1 << 30,
        "optimizer": optimizer,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": cell.get("dtype") == "bf16"},
        "gradient_clipping": 1.0,
        **more,
    }


class Trainer:
    """A model, its engine, and the losses so far."""

    def __init__(self, cell, *, is_ours, **more):
        torch.manual_seed(7)
        random.seed(7)
        self.cell = cell
        model, parameters = self._model()
        settings = config(cell, **(OURS if is_ours else {}), **more)
        if is_ours:
            assert "datastates_ckpt" not in settings
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=settings
        )
        is_built = type(self.engine.checkpoint_engine).__name__
        assert (is_built == "LazyCheckpointEngine") == is_ours, is_built

    def _model(self):
        kind = self.cell.get("kind", "language")
        if kind == "pipeline":
            model = pipeline(min(2, dist.get_world_size()))
        elif kind == "experts":
            ep_size = min(2, dist.get_world_size())
            model = Experts(num_experts=2, ep_size=ep_size)
        else:
            model = Language()
        parameters = [each for each in model.parameters() if each.requires_grad]
        if kind == "experts" and self.cell.get("stage", 0):
            from deepspeed.moe.utils import (
                split_params_into_different_moe_groups_for_optimizer as split,
            )

            parameters = split({"params": parameters, "name": "parameters"})
        return model, parameters

    def step(self, number):
        rank = dist.get_rank()
        if self.cell.get("kind") == "pipeline":
            rank = self.engine.grid.get_data_parallel_rank()
            return self.engine.train_batch(iter([batch(number, rank)])).item()
        loss = self.engine(*batch(number, rank))
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def run(self, first, last):
        return [self.step(number) for number in range(first, last)]

    def end(self):
        self.engine.destroy()
        self.engine = None
        gc.collect()


def check(problems, is_right, what):
    if not is_right:
        problems.append(f"rank {dist.get_rank()}: {what}")


def latest(directory):
    path = Path(directory, "latest")
    return path.read_text().strip() if path.exists() else None


def run_all(cases, run):
    """Runs each case in all ranks; rank 0 prints a line of JSON for each.

    `run(case, directory)` returns what this rank finds wrong. Many cases share the
    processes: importing takes far longer than a case.
    """
    for number, case in enumerate(cases):
        own = f"{sys.argv[2]}/{number}"
        try:
            problems = run(case, own)
        except Exception:  # noqa: BLE001 - told to the test
            problems = [f"rank {dist.get_rank()}: {traceback.format_exc()}"]
        all_problems = [None] * dist.get_world_size()
        torch.distributed.all_gather_object(all_problems, problems)
        found = [each for problems in all_problems for each in problems]
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps({"case": case, "problems": found}) + "\n")
            sys.stdout.flush()
            shutil.rmtree(own, ignore_errors=True)
        dist.barrier()
