"""How the commands speak: tables or JSON on standard output, errors on the other.

Names come from files that anybody may have written, so what cannot be printed is
escaped, and nothing is taken for markup.
"""

__all__ = [
    "complain",
    "print_json",
    "print_line",
    "print_table",
    "printable",
    "stderr",
    "stdout",
]

import json
import sys
from collections.abc import Iterable, Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Off a terminal no line is ever broken: whoever reads it wants whole rows.
_ENDLESS_COLUMNS = 100_000


def stdout() -> Console:
    """Standard output; coloured only on a terminal, and without `NO_COLOR`."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _ENDLESS_COLUMNS
    return console


def stderr() -> Console:
    """Standard error, likewise."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def printable(text: str) -> str:
    """`text` on one line, escaped where it would steer the terminal."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def print_json(result: object) -> None:
    """Prints a result as indented JSON."""
    try:
        text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    except UnicodeEncodeError:
        # A key may be any text, also half of a surrogate pair: escaped, it is JSON.
        text = json.dumps(msgspec.to_builtins(result), indent=2)
    sys.stdout.write(f"{text}\n")


def print_line(text: str, style: str = "") -> None:
    """Prints a line, wrapped only by the terminal itself."""
    stdout().print(Text(printable(text), style=style), soft_wrap=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under their headings; a heading that starts with `>` is a number's."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    stdout().print(table)


def complain(message: str) -> None:
    """Prints one line on standard error."""
    sys.stderr.write(f"aiockpt: {printable(message)}\n")
