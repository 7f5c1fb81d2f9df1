"""What happens to saves of a real `DeepSpeedEngine` that stock engines get wrong.

Started by torchrun with two ranks: `scenarios.py NAMES DIRECTORY [--install]`.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from late_staging import late_staging
from trainers import OURS, PATIENCE, Trainer, check, config, latest, run_all

from aiockpt.errors import CheckpointError, PeerError
from aiockpt.guard import StagingGate
from aiockpt.integrations.deepspeed import CheckpointEngine, install, lazy
from aiockpt.integrations.deepspeed.lazy import LazyCheckpointEngine
from aiockpt.integrations.deepspeed.roots import Roots
from aiockpt.storage import local_write
from gates import Gate

CELL = {"stage": 2, "dtype": "bf16"}


def published(root):
    return sorted(
        each.parts[-3] for each in Path(root).glob("*/.aiockpt/manifest.json")
    )


def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except CheckpointError as error:
        return error
    return None


def resumed(cell, root, first, last, **how):
    trainer = Trainer(cell, is_ours=True)
    trainer.engine.load_checkpoint(root, **how)
    losses = trainer.run(first, last)
    trainer.end()
    return losses


# --- the cases ----------------------------------------------------------------


def last_save_without_a_step(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    trainer.engine.save_checkpoint(root)
    trainer.engine.destroy()
    check(problems, latest(root) == "global_step1", f"latest is {latest(root)}")


def two_saves_without_a_step(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    for tag in ("one", "two", "two"):
        trainer.engine.save_checkpoint(root, tag=tag)
    trainer.engine.destroy()
    check(problems, latest(root) == "two", f"latest is {latest(root)}")
    check(problems, published(root) == ["one", "two"], f"{published(root)}")


def latest_stays_where_it_is(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.engine.save_checkpoint(root, tag="one")
    trainer.engine.save_checkpoint(root, tag="two", save_latest=False)
    trainer.engine.destroy()
    check(problems, latest(root) == "one", f"latest is {latest(root)}")
    check(problems, published(root) == ["one", "two"], f"{published(root)}")


def directories_in_turn(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    for step in range(3):
        trainer.run(step, step + 1)
        trainer.engine.save_checkpoint(f"{root}/{step % 2}")
    after = trainer.run(3, 5)
    trainer.engine.destroy()
    check(problems, latest(f"{root}/0") == "global_step3", "wrong latest in 0")
    check(problems, latest(f"{root}/1") == "global_step2", "wrong latest in 1")
    found = resumed(CELL, f"{root}/0", 3, 5)
    check(problems, found == after, f"resumed: {found} instead of {after}")


def a_load_sees_what_was_just_saved(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 2)
    trainer.engine.save_checkpoint(root)
    path, _ = trainer.engine.load_checkpoint(root)
    check(problems, path is not None, "nothing was loaded")
    trainer.end()


def engines_of_one_configuration_share(problems, root):
    one, two = Trainer(CELL, is_ours=True), Trainer(CELL, is_ours=True)
    shared = one.engine.checkpoint_engine
    check(problems, two.engine.checkpoint_engine is shared, "they share nothing")
    one.engine.save_checkpoint(f"{root}/one")
    one.end()
    two.run(0, 1)
    two.engine.save_checkpoint(f"{root}/two")
    two.end()
    check(problems, latest(f"{root}/one") == "global_step0", "the first is missing")
    check(problems, latest(f"{root}/two") == "global_step1", "the second is missing")


def extra_files_stay(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    for number in range(2):
        trainer.engine.save_checkpoint(root, tag="one")
        if dist.get_rank() == 0:
            Path(root, "one", f"notes-{number}").write_text("theirs")
        dist.barrier()
    trainer.end()
    found = os.listdir(f"{root}/one")
    for number in range(2):
        check(problems, f"notes-{number}" in found, f"notes-{number} is gone: {found}")


def no_step_waits_for_the_disk(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    gate = Gate()
    write = local_write.LocalWriteFile._write

    def held_write(*args):
        gate.pass_through()
        return write(*args)

    local_write.LocalWriteFile._write = held_write
    trainer.run(0, 1)
    trainer.engine.save_checkpoint(root)
    trainer.run(1, 4)
    trainer.engine.save_checkpoint(root)
    trainer.run(4, 5)
    gate.wait_reached()
    check(problems, latest(root) is None, "it was written after all")
    dist.barrier()
    gate.open()
    trainer.engine.destroy()
    local_write.LocalWriteFile._write = write
    check(problems, latest(root) == "global_step4", f"latest is {latest(root)}")
    check(problems, len(published(root)) == 2, f"{published(root)}")
    found = resumed(CELL, root, 1, 3, tag="global_step1")
    again = Trainer(CELL, is_ours=False)
    check(problems, found == again.run(0, 3)[1:], "what was saved first is torn")
    again.end()


def nothing_is_moved_or_freed_while_it_is_being_staged(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    gate = trainer.engine.checkpoint_engine._roots.machinery.gate
    destroy, staging = trainer.engine.optimizer.destroy, {}
    for name in ("offload_states", "reload_states", "destroy"):

        def note(*_, name=name, **__):
            staging[name] = len(gate._staging)

        # DeepSpeed's own want a GPU.
        setattr(trainer.engine.optimizer, name, note)
        with late_staging():
            trainer.engine.save_checkpoint(root, tag=name)
            getattr(trainer.engine, name)()
    destroy()
    found = {"offload_states": 0, "reload_states": 0, "destroy": 0}
    check(problems, staging == found, f"being staged: {staging}")


def what_was_gathered_is_not_written_back_while_it_is_being_staged(problems, root):
    trainer = Trainer({"stage": 3}, is_ours=True)
    trainer.run(0, 1)
    with late_staging():
        trainer.engine.save_checkpoint(root)
        # It writes all parameters back; of frozen ones that is what is being saved.
        trainer.engine.save_16bit_model(root)
        trainer.engine.save_checkpoint(root, tag="changed")
        frozen = trainer.engine.module.blocks[0].frozen.weight
        with deepspeed.zero.GatheredParameters([frozen], modifier_rank=0):
            frozen.data.zero_()
    trainer.end()
    check(problems, published(root) == ["changed", "global_step1"], published(root))
    dist.barrier()
    saved = torch.load(f"{root}/changed/zero_pp_rank_0_mp_rank_00_model_states.pt")
    fragments = saved["frozen_param_fragments"].values()
    check(problems, all(each.any() for each in fragments), "it was changed too early")


def what_changes_at_times_of_its_own_is_staged_at_once(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    engine, gate = trainer.engine, trainer.engine.checkpoint_engine
    staging = []
    with late_staging():
        for mode in ("zenflow", "super_offload", "is_deepcompile_enabled", None):
            if mode is not None:
                before = getattr(engine, mode)
                setattr(engine, mode, (lambda: True) if callable(before) else True)
            engine.save_checkpoint(root, tag=f"{mode}")
            staging.append(gate.is_staging)
            if mode is not None:
                setattr(engine, mode, before)
        # A hybrid engine wants a GPU; what its methods do first does not.
        for name in ("generate", "eval", "train"):
            engine.save_checkpoint(root, tag=name)
            hybrid = SimpleNamespace(checkpoint_engine=engine.checkpoint_engine)
            with contextlib.suppress(AttributeError, TypeError):
                getattr(DeepSpeedHybridEngine, name)(hybrid)
            staging.append(gate.is_staging)
    trainer.end()
    expected = [False, False, False, True, False, False, False]
    check(problems, staging == expected, f"being staged: {staging}")


def an_engine_that_is_collected_waits_for_nothing(problems, root):
    trainer, other = Trainer(CELL, is_ours=True), Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    trainer.engine.save_checkpoint(root)
    waits, wait, run = [], StagingGate.wait, Roots.run
    # As if it were collected in the middle of a save, or in a thread of the machinery.
    StagingGate.wait = lambda _: waits.append("staged")
    Roots.run = lambda _, work: waits.append(work.close() or "run")
    # What the collector calls; when it does is its own business.
    other.engine.__del__()
    StagingGate.wait, Roots.run = wait, run
    check(problems, other.engine.checkpoint_engine is None, "it kept its engine")
    check(problems, waits == [], f"it waited: {waits}")
    trainer.end()
    check(problems, latest(root) == "global_step1", f"latest is {latest(root)}")


def an_engine_that_is_only_assigned_commits_at_once(problems, root):
    trainer = Trainer(CELL, is_ours=False)
    trainer.run(0, 1)
    engine = trainer.engine.checkpoint_engine = CheckpointEngine(OURS)
    trainer.engine.save_checkpoint(root)
    check(problems, published(root) == ["global_step1"], f"{published(root)}")
    check(problems, latest(root) == "global_step1", f"latest is {latest(root)}")
    after = trainer.run(1, 3)
    trainer.end()
    engine.close()
    check(problems, resumed(CELL, root, 1, 3) == after, "resumed otherwise")


def a_rank_is_killed(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    trainer.engine.save_checkpoint(f"{sys.argv[2]}/killed")
    trainer.engine.checkpoint_engine.drain()
    trainer.run(1, 2)
    if dist.get_rank() == 1:
        local_write.LocalWriteFile._write = lambda *_: os.kill(
            os.getpid(), signal.SIGKILL
        )
    trainer.engine.save_checkpoint(f"{sys.argv[2]}/killed")
    trainer.run(2, 4)
    # Steps are not held up by writes: the kill may be yet to come.
    ours = trainer.engine.checkpoint_engine
    ours._wait(ours._commits)


def it_goes_on_after_the_kill(problems, root):
    root = f"{sys.argv[2]}/killed"
    check(problems, latest(root) == "global_step1", f"latest is {latest(root)}")
    trainer = Trainer(CELL, is_ours=True)
    trainer.engine.load_checkpoint(root)
    trainer.run(1, 2)
    trainer.engine.save_checkpoint(root)
    trainer.end()
    check(problems, latest(root) == "global_step2", f"latest is {latest(root)}")


def a_full_disk_on_one_rank(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    trainer.engine.save_checkpoint(root)
    trainer.run(1, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.engine.checkpoint_engine.drain()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    trainer.engine.save_checkpoint(root)
    trainer.run(2, 4)
    ours = trainer.engine.checkpoint_engine
    ours._wait(ours._commits)
    error = error_of(trainer.engine.save_checkpoint, root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(problems, isinstance(error, PeerError), f"{error!r} was raised")
    check(problems, getattr(error, "rank", None) == 1, f"{error!r} names no rank")
    check(problems, latest(root) == "global_step1", f"latest is {latest(root)}")
    trainer.run(4, 5)
    trainer.engine.save_checkpoint(root)
    after = trainer.run(5, 7)
    trainer.engine.destroy()
    check(problems, latest(root) == "global_step5", f"latest is {latest(root)}")
    check(problems, published(root) == ["global_step1", "global_step5"], "others")
    found = resumed(CELL, root, 5, 7)
    check(problems, found == after, f"resumed: {found} instead of {after}")


def what_cannot_be_saved_on_one_rank(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.engine.save_checkpoint(root, tag="one")
    # Only rank 0 saves the client's state.
    bad = {"call": lambda: None}
    trainer.engine.save_checkpoint(root, tag="two", client_state=bad)
    trainer.run(0, 1)
    error = error_of(trainer.engine.destroy)
    check(problems, isinstance(error, PeerError), f"{error!r} was raised")
    check(problems, "lambda" in str(error), f"{error!r} names no reason")
    check(problems, latest(root) == "one", f"latest is {latest(root)}")


def where_no_directory_can_be(problems, root):
    trainer = Trainer({"stage": 3, "dtype": "bf16"}, is_ours=True)
    trainer.run(0, 1)
    if dist.get_rank() == 0:
        os.makedirs(root)
        Path(root, ".aiockpt").write_text("in the way")
    dist.barrier()
    error = error_of(trainer.engine.save_checkpoint, root)
    check(problems, error is not None, "nothing was raised")
    trainer.run(1, 3)
    trainer.engine.save_checkpoint(f"{root}/other")
    trainer.end()
    check(problems, latest(f"{root}/other") == "global_step3", "the next one failed")


def under_a_file(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    if dist.get_rank() == 0:
        os.makedirs(root)
        Path(root, "file").write_text("in the way")
    dist.barrier()
    # Only rank 0 makes the directory; the others wait for it.
    error = error_of(trainer.engine.save_checkpoint, f"{root}/file/inside")
    check(problems, error is not None, "nothing was raised")
    trainer.engine.save_checkpoint(f"{root}/other")
    trainer.end()
    check(problems, latest(f"{root}/other") == "global_step1", "the next one failed")


def no_room_for_what_rank_0_copies(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.engine.save_checkpoint(root, tag="one")
    module = deepspeed.runtime.engine
    copyfile = module.copyfile

    def refused(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", target)

    module.copyfile = refused
    trainer.engine.save_checkpoint(root, tag="two")
    module.copyfile = copyfile
    trainer.run(0, 1)
    ours = trainer.engine.checkpoint_engine
    ours._wait(ours._commits)
    error = error_of(trainer.engine.save_checkpoint, root, tag="three")
    check(problems, getattr(error, "rank", None) == 0, f"{error!r} names no rank")
    check(problems, "No space left" in str(error), f"{error!r} does not tell why")
    check(problems, latest(root) == "one", f"latest is {latest(root)}")
    trainer.engine.save_checkpoint(root, tag="three")
    trainer.end()
    check(problems, published(root) == ["one", "three"], f"{published(root)}")


def a_16_bit_model_that_rank_0_cannot_save(problems, root):
    trainer = Trainer({"stage": 3, "dtype": "bf16"}, is_ours=True)
    ours, rank = trainer.engine.checkpoint_engine, dist.get_rank()

    def refused(path, *, exist_ok):
        raise OSError(errno.EACCES, "Permission denied", path)

    if rank == 0:
        ours.makedirs = refused
    told = None
    try:
        trainer.engine.save_16bit_model(root)
    except (CheckpointError, OSError) as error:
        told = error
    check(problems, "Permission denied" in str(told), f"{told!r} does not tell why")
    check(problems, isinstance(told, PeerError) == (rank != 0), f"{told!r} was raised")
    if rank == 0:
        del ours.makedirs
    trainer.engine.save_16bit_model(root)
    check(problems, os.path.exists(f"{root}/pytorch_model.bin"), "it is not there")
    trainer.end()


def no_memory_for_copies_on_one_rank(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.engine.save_checkpoint(root, tag="one")
    with_copies = lazy.with_copies

    def refused(*_args):
        raise torch.OutOfMemoryError("out of memory")

    if dist.get_rank() == 1:
        lazy.with_copies = refused
    trainer.engine.save_checkpoint(root, tag="two")
    lazy.with_copies = with_copies
    trainer.run(0, 1)
    error = error_of(trainer.engine.destroy)
    check(problems, getattr(error, "rank", None) == 1, f"{error!r} names no rank")
    check(problems, "out of memory" in str(error), f"{error!r} does not tell why")
    check(problems, latest(root) == "one", f"latest is {latest(root)}")


def the_documented_block(problems, root):
    cell = {"stage": 2}
    block = {"datastates_ckpt": {"host_cache_size": 1, "parser_threads": 8}}
    model = torch.nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(cell, **block)
    )
    ours = engine.checkpoint_engine
    check(problems, isinstance(ours, LazyCheckpointEngine), f"it is {ours}")
    check(problems, ours.config.parser_threads == 8, f"it has {ours.config}")
    check(problems, ours.config != OURS, "it is another's")
    engine.save_checkpoint(root, tag="one")
    engine.destroy()
    check(problems, latest(root) == "one", f"latest is {latest(root)}")


def before_install_nothing_is_changed(problems, root):
    engine = deepspeed.runtime.engine
    for name in ("save_checkpoint", "load_checkpoint", "destroy", "_take_model_step"):
        method = getattr(engine.DeepSpeedEngine, name)
        check(problems, method.__module__ == engine.__name__, f"{name} was changed")
        check(problems, not hasattr(method, "__wrapped__"), f"{name} was wrapped")
    cell = {"stage": 1}
    model = torch.nn.Linear(8, 8)
    built, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(cell, **OURS)
    )
    kind = type(built.checkpoint_engine).__name__
    check(problems, kind == "TorchCheckpointEngine", f"it is a {kind}")
    built.save_checkpoint(root, tag="one")
    check(problems, published(root) == [], "there is a manifest")
    built.destroy()
    install()
    install()


def nobody_destroys_it(problems, root):
    trainer = Trainer(CELL, is_ours=True)
    trainer.run(0, 1)
    # Kept alive, and outside of what is removed.
    globals()["last"] = trainer
    trainer.engine.save_checkpoint(f"{sys.argv[2]}/at-exit")


def run_case(name, directory):
    """What is wrong in one case."""
    problems = []
    globals()[name](problems, directory)
    return problems


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", timeout=PATIENCE)
    if "--install" in sys.argv:
        install()
    run_all(json.loads(sys.argv[1]), run_case)
    torch.distributed.destroy_process_group()
