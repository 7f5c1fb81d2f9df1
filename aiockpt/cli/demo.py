"""`aiockpt demo`: the show, or one training run to kill and resume by hand."""

__all__ = ["demo"]

import asyncio
import functools
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.filesize import decimal as format_bytes

from aiockpt.cli import output
from aiockpt.demo.display import Silence, display
from aiockpt.demo.show import Verdict, perform
from aiockpt.demo.trainer import Settings, train
from aiockpt.demo.worker import print_json


def demo(  # noqa: PLR0913 - a command's options are its arguments
    *,
    root: Annotated[
        Path | None,
        typer.Option(help="Do one training run here instead of the whole show."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 120,
    every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of a fresh start.")] = 0,
    kill: Annotated[
        bool, typer.Option("--kill", help="Die by SIGKILL in the second save.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on from the latest tag, if there is one.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a small model, be killed in the middle of a save, resume, and compare.

    With --root DIR: one run in DIR. Let it die with --kill, run it again without.
    """
    if root is None and (kill or not resume):
        raise typer.BadParameter(
            "--kill and --no-resume need --root: the place to resume"
        )
    settings = Settings(
        root=str(root), steps=steps, every=every, seed=seed, kill=kill, resume=resume
    )
    if root is not None:
        _train(settings, json=json)
    else:
        _show(settings, json=json)


def _train(settings: Settings, *, json: bool) -> None:
    if json:
        asyncio.run(train(settings, print_json))
        return
    title = f"training in {settings.root}"
    with display(output.stdout(), title, is_doomed=settings.kill) as emit:
        asyncio.run(train(settings, emit))


def _show(settings: Settings, *, json: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="aiockpt-demo-") as root:
        placed = msgspec.structs.replace(settings, root=root)
        if json:
            verdict = perform(placed, lambda _: Silence(), lambda _: None)
            output.print_json(verdict)
        else:
            stage = functools.partial(display, output.stdout())
            verdict = perform(placed, stage, output.print_line)
            _print_verdict(verdict)
    if not verdict.is_exact:
        raise typer.Exit(1)


def _print_verdict(verdict: Verdict) -> None:
    if verdict.is_exact:
        text = (
            f"EXACT: the losses of all {verdict.num_steps} steps and the "
            f"{verdict.num_tensors} tensors of the last checkpoint are equal, bit for "
            "bit, to those of the uninterrupted training."
        )
        output.print_line(text, style="bold green")
    else:
        text = (
            f"NOT EXACT: losses differ in steps {verdict.different_steps}, "
            f"tensors in {verdict.different_tensors}."
        )
        output.print_line(text, style="bold red")
    output.print_line(
        f"A save of {format_bytes(verdict.save_bytes)} held training for "
        f"{verdict.stall_s * 1e3:.1f} ms and was durable after "
        f"{verdict.durable_s * 1e3:.0f} ms (medians)."
    )
