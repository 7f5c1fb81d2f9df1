"""What a user relies on before the first call: commands, names, types, imports."""

import ast
import importlib.resources
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import aiockpt

ROOT = Path(__file__).parents[1]
MODULES = sorted(ROOT.glob("aiockpt/**/*.py"))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_ci_runs_the_command_that_the_readme_gives():
    commands = re.findall(
        r"^python3 -m pip install nox && .*$", text_of("README.md"), re.MULTILINE
    )
    assert len(commands) == 2
    ci_lines = text_of(".ci/run").splitlines()
    assert [c for c in commands if c in ci_lines] == [
        "python3 -m pip install nox && python3 -m nox -s tests lint types bench_smoke"
    ]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_session_that_a_page_names_exists(page):
    tree = ast.parse(text_of("noxfile.py"))
    sessions = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    commands = re.findall(r"nox -s ([a-z_ ]+)", text_of(page))
    named = {name for command in commands for name in command.split()}
    assert named
    assert named <= sessions


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_and_what_it_offers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    offers = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and re.match(r"__all__\b", ast.unparse(node))
    ]
    has_code = any(not isinstance(node, ast.Expr) for node in tree.body)
    assert bool(offers) == (has_code and path.name != "__main__.py")


def test_every_public_name_exists_and_is_documented():
    assert aiockpt.__all__
    for name in aiockpt.__all__:
        value = getattr(aiockpt, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert inspect.getdoc(value), name


def test_the_package_is_marked_as_typed():
    assert (importlib.resources.files("aiockpt") / "py.typed").is_file()


def test_importing_the_package_starts_nothing_and_needs_no_extra():
    program = """
import sys, threading
import aiockpt
assert threading.active_count() == 1, threading.enumerate()
extras = {"deepspeed", "safetensors", "uvloop", "lightning", "transformers"}
assert not extras & set(sys.modules), extras & set(sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, check=True, cwd=ROOT)
