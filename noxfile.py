"""What is checked, and how: `nox -l` lists it, plain `nox` runs what CI runs.

Arguments after `--` go to the session's last command: `nox -s tests -- -k ring`.
"""

import os
import shutil
from pathlib import Path

import nox
from nox.command import CommandFailed

CONSTRAINTS = "constraints.txt"
# CI starts from nothing; a developer's second run should start at once.
REUSE_VENV = "no" if os.environ.get("CI") else "yes"

# A process for each core, up to four: tests start processes of their own.
SHARED = ("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal")

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "types", "tests", "bench_smoke"]
nox.options.reuse_venv = REUSE_VENV
nox.options.error_on_external_run = True


def install(session: nox.Session, *extras: str) -> None:
    """Installs this checkout, editable, with `extras`.

    torch goes first and by its exact version: a range that other packages name
    is then satisfied already, whatever newer build an index offers.
    """
    session.install(_pinned("torch"))
    # DeepSpeed is built here from source; its kernels are not needed, and slow to make.
    session.env["DS_BUILD_OPS"] = "0"
    package = f".[{','.join(extras)}]" if extras else "."
    session.install("--constraint", CONSTRAINTS, "--editable", package)


def _pinned(name: str) -> str:
    lines = Path(CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, asyncio mistakes and the floors of the house."""
    tools = ["ruff", "flake8-async", "import-linter"]
    session.install("--constraint", CONSTRAINTS, *tools)
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    # These settle cancellations by hand, where all others must let them pass.
    settling = ("threads.py", "loop_thread.py")
    files = Path("aiockpt").rglob("*.py")
    session.run(
        "flake8-async", "--asyncio", *(f"{f}" for f in files if f.name not in settling)
    )
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Both type checkers, strict; `pyproject.toml` says on which files."""
    install(session, "dev", "integrations")
    session.run("mypy")
    session.run("pyright")


@nox.session
def tests(session: nox.Session) -> None:
    """pytest, without the tests that take minutes unless arguments say otherwise."""
    install(session, "dev", "integrations")
    session.run("pytest", *SHARED, *(session.posargs or ["-m", "not slow"]))


# And for how many seconds each is fuzzed in the fault matrix: those that open files
# try a hundredth of the inputs.
FUZZ_TARGETS = {
    "directory": 60,
    "local_header": 60,
    "outline": 60,
    "safetensors_header": 60,
    "manifest": 60,
    "pickle": 300,
    "file": 300,
}


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feeds hostile bytes to every parser, guided by coverage; seconds as argument."""
    install(session)
    session.install("atheris")
    seconds = session.posargs or ["60"]
    for target in FUZZ_TARGETS:
        script = "tests/hostile/run_atheris.py"
        session.run("python", script, target, "--seconds", *seconds)


FAULT_PROGRAMS = (
    *("losetup", "mkfs.btrfs", "mkfs.ext4", "mkfs.xfs", "mount", "strace"),
    *("chattr", "fsfreeze", "ip", "iptables", "tc"),
)


@nox.session
def faults(session: nox.Session) -> None:
    """The fault matrix at its long counts, as root; writes `docs/faults.md`.

    `--faults-share 0.1` as argument: a tenth of them.
    """
    missing = [name for name in FAULT_PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        packages = "xfsprogs btrfs-progs libfuse2 strace iproute2 iptables"
        session.error(f"this needs root and {packages}; missing: {missing}")
    install(session, "dev")
    session.install("mfusepy", "atheris")
    session.env["PYTHONPATH"] = "tests"
    session.env["HYPOTHESIS_PROFILE"] = "nightly"
    report = "tests/faults/report.py"
    begun = session.run("python", report, "begin", silent=True)
    results = str(begun).strip()
    told = f"--faults-report={results}"
    # The order of a commit's calls, as strace sees them, is what row 20 relies on.
    order = "tests/durability/test_commit_order.py"
    rows = ("tests/faults", "tests/hostile", order, *session.posargs)
    parts = [
        ("pytest", *SHARED, *rows, "--faults", told),
        *(
            ("python", "tests/hostile/run_atheris.py", name, "--seconds", str(s), told)
            for name, s in FUZZ_TARGETS.items()
        ),
        ("python", "-m", "faults.peers", results),
    ]
    # All of them, whatever the one before has found: it takes hours.
    failed = [part for part in parts if not _is_done(session, part)]
    session.run("python", report, "write", "docs/faults.md")
    if failed:
        session.error(f"these failed: {failed}")


def _is_done(session: nox.Session, command: tuple[str, ...]) -> bool:
    try:
        session.run(*command)
    except CommandFailed:
        return False
    return True


@nox.session
def bench(session: nox.Session) -> None:
    """Measures: all cases, or those that are arguments; then writes their page.

    Two hours and a half on an idle machine; as root, so that loads are cold.
    """
    install(session, "bench", "peers", "deepspeed")
    parts = [("python", "-m", "bench", *session.posargs)]
    if not session.posargs:
        parts.append(("python", "-m", "bench.deepspeed_saves"))
    parts.append(("python", "-m", "bench.report"))
    # All of them, whatever one before could not measure: it takes hours.
    failed = [part for part in parts if not _is_done(session, part)]
    if failed:
        session.error(f"these failed: {failed}")


@nox.session
def bench_smoke(session: nox.Session) -> None:
    """Runs every case tiny, checks the bytes, and writes a page that nobody keeps."""
    install(session, "bench", "peers")
    directory = Path(session.create_tmp())
    results = directory / "smoke.jsonl"
    results.unlink(missing_ok=True)
    docs = directory / "docs"
    docs.mkdir(exist_ok=True)
    run = ("python", "-m", "bench", "--scale", "tiny", "--out", f"{results}")
    session.run(*run, "--dir", f"{directory}", *session.posargs)
    session.run("python", "-m", "bench.report", f"{results}", "--docs", f"{docs}")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    together = ("bench.replicated", "--gib", "0.02", "--repeats", "1")
    session.run("python", "-m", *launcher, "-m", *together, "--dir", f"{directory}")


@nox.session
def demo(session: nox.Session) -> None:
    """Installs the package as a user would and runs its demonstration."""
    install(session)
    session.run("python", "-m", "aiockpt", "demo", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Builds the documentation; a warning is an error."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())
