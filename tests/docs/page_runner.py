"""Runs the blocks of one page, given as JSON on standard input; see `test_code_blocks`.

A block with a bare `await` runs as it would in a notebook: on one event loop, which
is there from the first such block to the end of the page.
"""

import ast
import asyncio
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCK_BEGINS = "\x1e"
"""Printed before the output of each block."""


def main() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    with asyncio.Runner() as runner:
        for block in json.load(sys.stdin):
            sys.stdout.write(BLOCK_BEGINS)
            sys.stdout.flush()
            run(block, names, runner)
            sys.stdout.flush()


def run(block: dict[str, Any], names: dict[str, Any], runner: asyncio.Runner) -> None:
    if block["title"] is not None:
        Path(block["title"]).write_text(block["source"], encoding="utf-8")
    elif block["language"] == "sh":
        # A reader sees both streams.
        command = ["bash", "-euo", "pipefail", "-c", block["source"]]
        subprocess.run(command, stderr=subprocess.STDOUT, check=True)
    else:
        # Line numbers are those of the page.
        source = "\n" * block["line"] + block["source"]
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, block["page"], "exec", flags)
        if code.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(code, names))
        else:
            exec(code, names)


if __name__ == "__main__":
    main()
