"""The blocks of the documentation's pages, and what is said of them.

A block's title makes it a file of that name. A comment before a block says more:

    <!-- not run: WHY -->    it is not run
    <!-- needs: PACKAGE -->  it is run where the package is installed
    <!-- prints -->          it shows what the block before prints; `...` is any text
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Written by `nox -s faults` and `nox -s bench`.
GENERATED = {DOCS / "faults.md", DOCS / "performance.md"}
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if page not in GENERATED
]

RUN = {"python", "sh"}
# Nothing that could be run.
SHOWN = {"", "ini", "json", "text", "toml", "yaml"}

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)(?P<options>[^\n]*)\n"
    r"(?P<source>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_TITLE = re.compile(r'title="([^"]+)"')
MARK = re.compile(r"(not run: .{8,}|needs: \w+|prints)")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Its page, relative to the repository.
        line: The line of its fence, counted from 1.
        language: What stands behind the fence.
        title: The file that it is, if it is one.
        mark: What is said of it, or nothing.
        source: Its lines, not indented.
    """

    page: str
    line: int
    language: str
    title: str | None
    mark: str
    source: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.mark.startswith("not run: ")

    @property
    def is_output(self) -> bool:
        return self.mark == "prints"

    @property
    def needed(self) -> str | None:
        _, is_needed, package = self.mark.partition("needs: ")
        return package if is_needed else None

    @classmethod
    def of(cls, page: Path, text: str, match: re.Match[str]) -> Self:
        title = _TITLE.search(match["options"])
        return cls(
            page=str(page.relative_to(ROOT)),
            line=text.count("\n", 0, match.start("language")) + 1,
            language=match["language"],
            title=title[1] if title else None,
            mark=match["mark"] or "",
            source=textwrap.dedent(match["source"]),
        )


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block.of(page, text, match) for match in _BLOCK.finditer(text)]
