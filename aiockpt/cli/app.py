"""The commands: each reads its arguments, calls one function and prints its result."""

__all__ = ["app", "main"]

import contextlib
import functools
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import msgspec
import typer
from rich.filesize import decimal as format_bytes
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from aiockpt.cli import output
from aiockpt.cli.comparison import compare
from aiockpt.cli.contents import contents
from aiockpt.cli.demo import demo
from aiockpt.cli.places import find, open_catalog, work_bytes
from aiockpt.cli.rendering import (
    age,
    render_contents,
    render_difference,
    render_verification,
)
from aiockpt.cli.verification import num_bytes, verify
from aiockpt.errors import CheckpointError, CorruptCheckpointError
from aiockpt.manifest import TagInfo

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="aiockpt",
    help="Look at checkpoints, check them, compare them, remove them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Directory of the tags.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Runs the command line and exits with its status."""
    app()


def _command(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a command of a function whose errors are one line and status 1."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            raise  # typer ends quietly: the reader of the pipe has seen enough.
        except (CheckpointError, OSError) as error:
            output.complain(str(error))
            raise typer.Exit(1) from error

    return guarded


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The tags of a root, oldest first."""

    root: str
    latest: str | None
    tags: list[TagInfo]


@app.command("ls")
@_command
def list_tags(root: Root, *, json: Json = False) -> None:
    """List the published tags of ROOT, oldest first."""
    catalog = open_catalog(root)
    tags = catalog.tags()
    listing = Listing(root=str(root), latest=catalog.latest(), tags=tags)
    if json:
        output.print_json(listing)
        return
    now_ns = time.time_ns()
    output.print_table(
        ["tag", ">age", ">bytes", ">files", ""],
        [
            (
                info.tag,
                age((now_ns - info.published_ns) / 1e9),
                format_bytes(info.nbytes),
                str(len(info.files)),
                "latest" if info.tag == listing.latest else "",
            )
            for info in listing.tags
        ],
    )


@app.command("inspect")
@_command
def inspect_place(
    place: Annotated[Path, typer.Argument(metavar="PLACE", help="A file or a tag.")],
    *,
    json: Json = False,
) -> None:
    """Show the tensors of PLACE: keys, dtypes, shapes, bytes, and what they share."""
    found = contents(find(place))
    if json:
        output.print_json(found)
    else:
        render_contents(found)


@app.command("verify")
@_command
def verify_place(
    place: Annotated[
        Path, typer.Argument(metavar="PLACE", help="A root, a tag, or a file.")
    ],
    *,
    json: Json = False,
) -> None:
    """Read every byte of PLACE and compare it with its checksums; status 1 if wrong."""
    target = find(place)
    with _progress(num_bytes(target)) as advance:
        found = verify(target, advance)
    if json:
        output.print_json(found)
    else:
        render_verification(found)
    if found.faults:
        raise typer.Exit(1)


@app.command("diff")
@_command
def diff_places(
    a: Annotated[Path, typer.Argument(metavar="A", help="A file or a tag.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    *,
    json: Json = False,
) -> None:
    """Compare the tensors of A and B; status 1 if they differ."""
    difference = compare(find(a), find(b))
    if json:
        output.print_json(difference)
    else:
        render_difference(difference)
    if not difference.is_same:
        raise typer.Exit(1)


@app.command("rm")
@_command
def remove_tag(
    root: Root,
    tag: Annotated[str, typer.Argument(metavar="TAG", help="The tag to remove.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove the tag TAG from ROOT."""
    catalog = open_catalog(root)
    try:
        size = format_bytes(catalog.manifest(tag).nbytes)
    except CorruptCheckpointError:
        size = "damaged"
    if not yes:
        typer.confirm(f"Remove {tag} ({size}) from {root}?", abort=True)
    catalog.open_work()
    try:
        catalog.delete(tag)
    finally:
        catalog.close_work()
    output.print_line(f"removed {tag} ({size})")


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep removed: the work of dead engines, and its bytes."""

    root: str
    engines: list[str]
    nbytes: int


@app.command("sweep")
@_command
def sweep_root(root: Root, *, json: Json = False) -> None:
    """Remove what killed processes left unpublished in ROOT; live ones keep theirs."""
    catalog = open_catalog(root)
    sizes = work_bytes(root)
    engines = catalog.sweep()
    nbytes = sum(sizes.get(engine, 0) for engine in engines)
    swept = Swept(root=str(root), engines=engines, nbytes=nbytes)
    if json:
        output.print_json(swept)
        return
    for engine in engines:
        size = format_bytes(sizes.get(engine, 0))
        output.print_line(f"removed {size} of dead engine {engine}")
    if not engines:
        output.print_line("nothing to remove")


app.command("demo")(_command(demo))


@contextlib.contextmanager
def _progress(total_bytes: int) -> Generator[Callable[[int], None]]:
    """A bar on standard error, gone in the end; nothing off a terminal."""
    console = output.stderr()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as bars:
        task = bars.add_task("", total=total_bytes)
        yield functools.partial(bars.advance, task)
