"""Every block of code that a reader may copy runs as it stands, or says why not.

The blocks of a page run in their order, in a directory and a process of their own.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aiockpt import errors
from docs.page_runner import BLOCK_BEGINS
from docs.pages import DOCS, MARK, PAGES, ROOT, RUN, SHOWN, Block, blocks

RUNNER = Path(__file__).with_name("page_runner.py")
BLOCKS = {str(page.relative_to(ROOT)): blocks(page) for page in PAGES}


def runnable(page: str) -> list[Block]:
    """What is run of a page; of the README, Python only."""
    languages = {"python"} if page == "README.md" else RUN
    return [
        block
        for block in BLOCKS[page]
        if block.is_run and block.language in languages and is_there(block.needed)
    ]


def is_there(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def run(page: str, directory: Path) -> list[str]:
    """What each block of the page prints."""
    # Commands are those of this environment, as in a reader's.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # What a program prints before it is killed is not to be lost in a buffer.
    variables["PYTHONUNBUFFERED"] = "1"
    ran = subprocess.run(
        [sys.executable, "-W", "error", RUNNER],
        cwd=directory,
        env={**os.environ, **variables},
        input=json.dumps([vars(block) for block in runnable(page)]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stderr}\nprinted: {ran.stdout}"
    assert ran.stderr == ""
    return ran.stdout.split(BLOCK_BEGINS)[1:]


def is_shown_as(printed: str, shown: str) -> bool:
    """Whether it is the same text, widths of columns aside."""
    printed, shown = (re.sub(r"[ \n]+", " ", text).strip() for text in (printed, shown))
    parts = [re.escape(part) for part in shown.split("...")]
    return re.fullmatch(".*".join(parts), printed) is not None


def test_there_are_blocks_to_run():
    assert sum(len(runnable(page)) for page in BLOCKS) >= 40


# Each command that a page runs is an interpreter that imports torch.
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in BLOCKS if runnable(page)])
def test_the_blocks_of_a_page_run_without_a_warning_and_print_what_is_shown(
    page, tmp_path
):
    outputs = dict(zip(runnable(page), run(page, tmp_path), strict=True))

    for before, block in zip(BLOCKS[page], BLOCKS[page][1:], strict=False):
        if block.is_output and before in outputs:
            printed = outputs[before]
            assert is_shown_as(printed, block.source), f"{block.place}: {printed}"


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_of_a_known_kind_and_every_mark_belongs_to_one(page):
    for block in BLOCKS[page]:
        assert block.language in RUN | SHOWN, block.place
        assert not block.mark or MARK.fullmatch(block.mark), block.place
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!--") == sum(bool(block.mark) for block in BLOCKS[page])
    # Two to a block: none has been overlooked.
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(BLOCKS[page])


@pytest.mark.parametrize("page", BLOCKS)
def test_what_is_shown_as_printed_follows_what_prints_it(page):
    for before, block in zip([None, *BLOCKS[page]], BLOCKS[page], strict=False):
        if block.is_output:
            assert before is not None, block.place
            assert before.is_run, block.place
            assert before.title is None, block.place


def test_every_error_has_its_place_in_the_guide():
    guide = (DOCS / "guides" / "errors.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\w+Error)\b", guide, re.MULTILINE)
    assert sorted(headings) == sorted(errors.__all__)


def test_pages_load_nothing_from_elsewhere():
    for page in DOCS.rglob("*"):
        if page.suffix in {".md", ".css", ".svg", ".html"}:
            text = page.read_text(encoding="utf-8")
            assert not re.search(r"(src|@import|url\()\W*https?:", text), page
