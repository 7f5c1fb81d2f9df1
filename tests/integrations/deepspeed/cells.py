"""Runs configurations, each with DeepSpeed's own checkpoint engine and with ours.

Started by torchrun: `cells.py CELLS DIRECTORY`.
"""

import json
import os
import sys
from argparse import Namespace

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.ds_to_universal import main as to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from late_staging import late_staging
from trainers import PATIENCE, Trainer, check, latest, run_all

from aiockpt import guard
from aiockpt.integrations.deepspeed import install

BEFORE, AFTER = 3, 3
TAG = f"global_step{BEFORE}"


def run_cell(cell, directory):
    """What is wrong with our checkpoints of this configuration."""
    problems = []
    stock_dir, our_dir = f"{directory}/stock", f"{directory}/ours"
    client = {"epoch": 3, "best": {"loss": 0.5}}
    stock = Trainer(cell, is_ours=False)
    before = stock.run(0, BEFORE)
    stock.engine.save_checkpoint(stock_dir, client_state=client)
    after = stock.run(BEFORE, BEFORE + AFTER)
    stock.end()

    ours = Trainer(cell, is_ours=True)
    check(problems, ours.run(0, BEFORE) == before, "training differs before the save")
    with late_staging():
        ours.engine.save_checkpoint(our_dir, client_state=client)
        found = ours.run(BEFORE, BEFORE + AFTER)
    check(problems, found == after, f"training differs after the save: {found} {after}")
    ours.end()
    check_files(problems, stock_dir, our_dir)

    for is_ours, where in ((True, our_dir), (False, our_dir), (True, stock_dir)):
        resumed = Trainer(cell, is_ours=is_ours)
        path, state = resumed.engine.load_checkpoint(where)
        check(problems, path is not None, f"nothing was loaded from {where}")
        check(problems, state and state.get("epoch") == 3, "no client state")
        found = resumed.run(BEFORE, BEFORE + AFTER)
        what = f"resumed (ours: {is_ours}) from {where}: {found} instead of {after}"
        check(problems, found == after, what)
        resumed.end()
    if "weights" in cell.get("extras", ()):
        check_weights(problems, cell, directory)
    if "fp32" in cell.get("extras", ()) and dist.get_rank() == 0:
        states = map(get_fp32_state_dict_from_zero_checkpoint, (stock_dir, our_dir))
        found = difference(*map(dict, states))
        check(problems, found is None, f"zero_to_fp32 differs at {found}")
    if "universal" in cell.get("extras", ()):
        check_universal(problems, cell, stock_dir, our_dir)
    return problems


def check_weights(problems, cell, directory):
    """`save_16bit_model` writes what the other engine writes, and moves no `latest`."""
    weights = []
    for is_ours in (False, True):
        trainer = Trainer(cell, is_ours=is_ours)
        trainer.run(0, 2)
        root = f"{directory}/weights-{is_ours}"
        trainer.engine.save_checkpoint(root)
        trainer.engine.save_16bit_model(root)
        # Its commit waits for what was handed over before.
        check(problems, latest(root) == "global_step2", f"latest is {latest(root)}")
        if not is_ours:
            dist.barrier()
        weights.append(torch.load(f"{root}/pytorch_model.bin"))
        trainer.engine.save_16bit_model(f"{root}-alone")
        dist.barrier()
        found = os.listdir(f"{root}-alone")
        check(problems, "pytorch_model.bin" in found, "no 16-bit weights")
        check(problems, "latest" not in found, "latest is there")
        trainer.end()
    found = difference(*weights)
    check(problems, found is None, f"16-bit weights differ at {found}")


def check_universal(problems, cell, stock_dir, our_dir):
    """`ds_to_universal` converts our files as it does DeepSpeed's; ours loads both."""
    losses = []
    for where in (stock_dir, our_dir):
        if dist.get_rank() == 0:
            to_universal(
                Namespace(
                    input_folder=f"{where}/{TAG}",
                    output_folder=f"{where}/universal",
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=cell["stage"] < 3,
                )
            )
        dist.barrier()
        settings = {"checkpoint": {"load_universal": True}}
        resumed = Trainer(cell, is_ours=where == our_dir, **settings)
        resumed.engine.load_checkpoint(where, tag="universal")
        losses.append(resumed.run(BEFORE, BEFORE + AFTER))
        resumed.end()
    check(problems, losses[0] == losses[1], f"universal differs: {losses}")


def check_files(problems, stock_dir, our_dir):
    """Both directories hold the same files with the same content."""
    check(problems, latest(our_dir) == TAG, f"latest is {latest(our_dir)!r}")
    expected = sorted(os.listdir(f"{stock_dir}/{TAG}"))
    found = sorted(set(os.listdir(f"{our_dir}/{TAG}")) - {".aiockpt"})
    check(problems, found == expected, f"{found} instead of {expected}")
    outside = {".aiockpt", TAG}
    expected = set(os.listdir(stock_dir)) - outside
    check(problems, set(os.listdir(our_dir)) - outside == expected, "other files")
    if dist.get_rank() == 0:
        for name in found:
            check_file(
                problems, *(f"{each}/{TAG}/{name}" for each in (stock_dir, our_dir))
            )


def check_file(problems, stock, ours):
    """Both files hold the same; ours is not larger."""
    if not ours.endswith(".pt"):
        return
    states = [torch.load(each, weights_only=False) for each in (stock, ours)]
    for state in states:
        # It tells which engine is to be used.
        state.pop("ds_config", None)
    found = difference(*states)
    check(problems, found is None, f"{ours} differs at {found}")
    sizes = [os.path.getsize(each) for each in (stock, ours)]
    check(problems, sizes[1] < 1.2 * sizes[0] + 65536, f"{ours} is large: {sizes}")


def difference(expected, found, where="state"):
    """Where two loaded states differ, to the bit and to the class; else None."""
    if isinstance(found, torch.Size):
        # DeepSpeed's own engine saves shapes as tuples where there are experts.
        expected, found = tuple(expected), tuple(found)
    if type(expected) is not type(found):
        return f"{where}: {type(expected)} is not {type(found)}"
    if isinstance(expected, torch.Tensor):
        is_same = expected.dtype == found.dtype and torch.equal(expected, found)
        return None if is_same else f"{where}: {expected} is not {found}"
    if isinstance(expected, dict):
        if list(expected) != list(found):
            return f"{where}: {list(expected)} is not {list(found)}"
        pairs = [(expected[key], found[key], f"{where}[{key!r}]") for key in expected]
    elif type(expected) in {list, tuple}:
        if len(expected) != len(found):
            return f"{where}: {len(expected)} is not {len(found)} long"
        pairs = [(a, b, where) for a, b in zip(expected, found, strict=True)]
    elif hasattr(expected, "__dict__") and not callable(expected):
        pairs = [(vars(expected), vars(found), where)]
    else:
        return None if expected == found else f"{where}: {expected!r} is not {found!r}"
    return next(filter(None, (difference(*pair) for pair in pairs)), None)


if __name__ == "__main__":
    # Without the guard of torch's optimizers: what is installed holds updates by itself.
    guard._Hook._before_step = lambda *_: None
    deepspeed.init_distributed("gloo", timeout=PATIENCE)
    install()
    run_all(json.loads(sys.argv[1]), run_cell)
    torch.distributed.destroy_process_group()
