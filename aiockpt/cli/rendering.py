"""Results as people read them."""

__all__ = ["age", "render_contents", "render_difference", "render_verification"]

from rich.filesize import decimal as format_bytes

from aiockpt.cli import output
from aiockpt.cli.comparison import Difference
from aiockpt.cli.contents import Contents, FileContents
from aiockpt.cli.verification import Verification

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def age(seconds: float) -> str:
    """How long ago: `3 min`, in the largest unit of which there is at least one."""
    for unit, unit_s in _UNITS:
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {unit}"
    return "now"


def render_contents(found: Contents) -> None:
    """Prints a table for each file, and what it comes to."""
    for file in found.files:
        output.print_line(f"{file.path}  {_summary(file)}", style="bold")
        output.print_table(
            ["key", "dtype", "shape", ">bytes", "record", ""],
            [
                (
                    tensor.key,
                    tensor.dtype,
                    str(list(tensor.shape)),
                    str(tensor.nbytes),
                    tensor.record or "",
                    f"shared with {tensor.shared_with}" if tensor.shared_with else "",
                )
                for tensor in file.tensors
            ],
        )


def _summary(file: FileContents) -> str:
    return (
        f"{file.container}, {format_bytes(file.nbytes)}: "
        f"{len(file.tensors)} tensors, {format_bytes(file.tensor_bytes)} "
        f"in records of {format_bytes(file.record_bytes)}; "
        f"{file.num_objects} other values"
    )


def render_verification(found: Verification) -> None:
    """Prints each fault on standard error, and what was checked."""
    for fault in found.faults:
        output.complain(fault.message)
    verdict = f"{len(found.faults)} at fault" if found.faults else "all sound"
    output.print_line(
        f"{found.num_files} files, {format_bytes(found.nbytes)}: {verdict}",
        style="red" if found.faults else "green",
    )


def render_difference(difference: Difference) -> None:
    """Prints a line for each tensor that differs, marked as `diff` marks lines."""
    for key in difference.only_in_a:
        output.print_line(f"- {key}", style="red")
    for key in difference.only_in_b:
        output.print_line(f"+ {key}", style="green")
    for change in difference.changed:
        output.print_line(f"! {change.key}  {change.a} -> {change.b}", style="yellow")
    for key in difference.different:
        output.print_line(f"~ {key}  bytes differ", style="yellow")
    output.print_line(f"{difference.num_equal} tensors are equal, byte for byte")
