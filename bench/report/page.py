"""The page of results: tables, plots, and the targets with what was reached."""

__all__ = ["write"]

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cases import CASES
from bench.contenders import CONTENDERS, ELSEWHERE
from bench.contenders.ours import OurEngine
from bench.report import deepspeed, gpu
from bench.report.plots import Bar, Line, bars, lines
from bench.report.remarks import REMARKS
from bench.report.results import CellResults, Results, read_newest
from bench.report.tables import SECTIONS, Column, Section, table
from bench.report.targets import TARGETS
from bench.workloads import GIB, Scale

_HEAD = """\
# Performance

<!-- Written by `python -m bench.report`; change that instead. -->

What aiockpt costs beside the raw disk, and beside the tools that people use today. A
figure where another tool is better stays in.

"""
# Written by hand: what single benchmarks told before there was this suite.
_EARLIER = Path(__file__).with_name("earlier.md")
_METHOD = """\
## How it was measured

- Each contender has a process of its own; they take turns within each repeat, in an
  order that changes. Figures are medians, with the least and the greatest in brackets;
  ratios are those of the same repeat.
- Bytes are compared with what was to be saved after every measured save and load of a
  contender; not after commits that are measured for themselves.
- Durability is equal: who does not sync gets an fsync of files and directories added to
  the measured time, and the name, or the list of contenders, says so.
- Between saves every tensor is changed, so that a stale one is noticed. Files up to
  commit ca6f892 are from before: there the state stayed the same, nothing tiny was
  loaded before a cold load, and memory in helper processes was looked at once, late.
- One save of each process comes before those that are counted (none where the state is
  8 GiB). aiockpt's ring has its memory from then on; contenders that copy the state
  take memory for that anew with each save, unless they keep it themselves. First saves
  are under *Stall*.
- Loads are cold unless they say otherwise: caches are dropped, and every load has a new
  process.
- The state lies once in shared memory, and all contenders save that. Extra memory is
  the high-water mark above the process before the contender was set up; in helper
  processes, the high-water mark of what is theirs alone.
- Absolute times of this machine mean little elsewhere; the ratios are what counts.

`python -m bench` measures again, `python -m bench.report` writes this page.

"""


_WORDS = {True: "met", False: "**missed**", None: "not told apart"}
_ADDED = """\
Rows that begin with *added* are none of the project's targets. `preflight` is a call
before step 1 that takes the ring's memory and plans the state once: the "first" planning
after it is a second one, and what the call takes stands under *Stall*. *Not told apart*:
the repeats of the two overlap.
"""

_STAGES = {
    "plan_s": "planned",
    "stage_s": "all staged after",
    "write_s": "all written after",
    "sync_s": "fsync of files",
    "publish_s": "published in",
    "durable_s": "durable after",
}


def write(results: Results, page: Path, plots: Path) -> None:
    """Writes the page and its plots."""
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    text = "".join(_parts(results, page, plots))
    page.write_text(text, encoding="utf-8")


def _parts(results: Results, page: Path, plots: Path) -> Iterator[str]:
    drawer = _Drawer(page, plots)
    yield _HEAD + _source(results)
    yield _targets(results)
    yield _METHOD
    yield from _sections(results, drawer)
    yield _growth(results, drawer)
    yield _stages(results)
    yield deepspeed.section(results.path.parent)
    if (on_gpu := read_newest(results.path.parent, "gpupeers")) is not None:
        yield f"## On a GPU\n\n{_source(on_gpu)}{_without(on_gpu)}"
        yield from _sections(on_gpu, drawer)
    yield _ranks(results)
    yield _contenders(results)
    yield _EARLIER.read_text(encoding="utf-8")


def _sections(results: Results, drawer: "_Drawer") -> Iterator[str]:
    """What was measured of the cases that are shown one by one."""
    for section in SECTIONS:
        for index, cell in enumerate(results.case(section.case)):
            if index == 0:
                yield f"## {section.title}\n\n{section.text}\n\n"
            yield _cell(section, cell, drawer)


def _without(results: Results) -> str:
    """Who does not run on the machine, and why."""
    reasons = {
        f"- {name}: {_plain(reason)}\n"
        for cell in results.cells.values()
        for name, reason in cell.reasons.items()
    }
    return f"Not there:\n\n{''.join(sorted(reasons))}\n" if reasons else ""


def _source(results: Results) -> str:
    machine = results.machine
    skipped = {"commit", "cores", "memory_gib", "processor", "kernel", "file_system"}
    versions = ", ".join(
        f"{name} {value}"
        for name, value in machine.items()
        if name not in skipped and name != "huge_pages" and value is not None
    )
    scale = (
        ""
        if results.scale == "full"
        else (
            f'\n!!! warning "Not a full run"\n    Sizes and repeats are those of the '
            f"`{results.scale}` scale; targets are for full sizes.\n"
        )
    )
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}), "
        f"{machine['memory_gib']} GiB of memory, {machine['file_system']}, kernel "
        f"{machine['kernel']}; {versions}. {_files(results)}\n{scale}{_missing(results)}\n"
    )


def _missing(results: Results) -> str:
    """A warning where cells, or contenders in them, were not measured."""
    if not results.missing:
        return ""
    listed = "".join(f"    - {_plain(each)}\n" for each in results.missing)
    return f'\n!!! warning "Not measured, or not by these files"\n\n{listed}'


def _files(results: Results) -> str:
    """Which numbers come from which file."""
    cases: dict[tuple[Path, str], list[str]] = {}
    for (case, cell), source in results.sources.items():
        files = {each for key, each in results.sources.items() if key[0] == case}
        name = case if len(files) == 1 else f"{case} ({cell})"
        if name not in cases.setdefault(source, []):
            cases[source].append(name)
    links = {
        (path, commit): f"[`{path.name}`](results/{path.name}.txt), commit `{commit}`"
        for path, commit in cases
    }
    if len(cases) == 1:
        (link,) = links.values()
        return f"All numbers come from {link}."
    told = "; ".join(f"{link}: {', '.join(cases[key])}" for key, link in links.items())
    return f"The numbers come from {told}."


def _targets(results: Results) -> str:
    heads = "| metric | workload | target | measured | |\n|---|---|---|---|---|\n"
    rows = []
    for target in TARGETS:
        verdict = target.verdict(results)
        if verdict is None:
            figure, word = "–", "not measured"
        else:
            figure, word = verdict.figure, _WORDS[verdict.is_met]
        aim = f"*added:* {target.aim}" if target.is_added else target.aim
        rows.append(
            f"| {target.metric} | {target.workload} | {aim} | {figure} | {word} |\n"
        )
    on_gpu = gpu.rows(results.path.parent)
    # Every metric has one.
    known = {
        target.metric: REMARKS[target.metric] for target in TARGETS if target.metric
    }
    remarks = "".join(
        f"- **{metric}**. Spent on: {each.spent} Tried: {each.tried} "
        f"Remains: {each.remains}\n"
        for metric, each in known.items()
    )
    return (
        f"## Targets\n\n{heads}{''.join(rows)}{on_gpu}\n{_ADDED}\n"
        f"Where the time goes, what was tried and what remains:\n\n{remarks}\n"
    )


def _cell(section: Section, cell: CellResults, drawer: "_Drawer") -> str:
    head = f"### {cell.name}\n\n" if cell.measured else ""
    if not head:
        return ""
    numbers = {name: len(rows) for name, rows in cell.measured.items()}
    most = max(numbers.values())
    about = f"{cell.workload.label}, n = {most}"
    fewer = [f"{number} of {name}" for name, number in numbers.items() if number < most]
    if fewer:
        about += f" (but {', '.join(fewer)})"
    if cell.options.get("ring_gib") is not None:
        about += f"; ring of aiockpt {cell.options['ring_gib']:g} GiB"
    if cell.is_unduly_warm:
        about += "; **not cold**: the page cache could not be dropped"
    plot = drawer.bars(cell, section.plotted) if section.plotted else ""
    return f"{head}{about}.\n\n{table(cell, section.columns)}\n\n{plot}"


def _stages(results: Results) -> str:
    """Where the engine's time goes, as its own reports tell."""
    heads = " | ".join(f"{head}, ms" for head in _STAGES.values())
    rows = []
    for cell in results.cells.values():
        told = [cell.spread(OurEngine.name, key, scale=1e3) for key in _STAGES]
        if told[0] is not None:
            figures = " | ".join(each.text(1) if each else "–" for each in told)
            rows.append(f"| {cell.case}: {cell.name} | {figures} |\n")
    if not rows:
        return ""
    return (
        "## Where the engine's time goes\n\nFrom its own commit reports. *After* counts "
        "from the call of `save`; the stages overlap.\n\n"
        f"| case | {heads} |\n|---|{'---:|' * len(_STAGES)}\n{''.join(rows)}\n"
    )


def _growth(results: Results, drawer: "_Drawer") -> str:
    cells = results.case("growth")
    by_size = [cell for cell in cells if cell.name.startswith("size")]
    by_count = [cell for cell in cells if cell.name.startswith("tensors")]
    if not cells:
        return ""
    text = (
        "## Growth\n\nDurable throughput over the size of the state, and over the number "
        "of tensors at equal size. The others stop at 1 GiB, and DCP at 10 000 tensors: "
        "their way of growing shows there, and a run should end within two and a half hours.\n\n"
    )
    columns = SECTIONS[0].columns
    for cell in cells:
        text += f"### {cell.name}\n\n{cell.workload.label}.\n\n"
        text += f"{table(cell, columns)}\n\n"
    text += drawer.lines("growth-size", "Durable throughput by size", by_size, "GiB")
    text += drawer.lines(
        "growth-tensors", "Durable throughput by tensors", by_count, "tensors"
    )
    return text


_RANK_KINDS = {
    "processes": "agreement of processes",
    "simulated": "agreement, simulated",
    "commits": "commit of processes",
}


def _ranks(results: Results) -> str:
    if not results.ranks:
        return ""
    rows = "".join(
        f"| {_RANK_KINDS[line['kind']]} | {line['ranks']} | {line['median_ms']:.2f} "
        f"({line['min_ms']:.2f}–{line['max_ms']:.2f}) | {line['median_cpu_ms']:.2f} |\n"
        for line in results.ranks
    )
    return (
        "## Ranks\n\nOne agreement of all ranks, as each commit needs one; and whole "
        "commits, of a written file of 4 KiB from every rank; 50 of each. All ranks "
        "share this machine's cores, so the time holds the work of all, one after "
        "another.\n\n"
        "| what | ranks | ms | processor time of rank 0, ms |\n|---|---:|---:|---:|\n"
        f"{rows}\n"
    )


class _Drawer:
    """Draws plots to files, and says how a page shows them."""

    def __init__(self, page: Path, plots: Path) -> None:
        self._page = page
        self._plots = plots

    def bars(self, cell: CellResults, column: Column) -> str:
        """A bar for each contender."""
        rows = [
            Bar(name, spread, _kind(name))
            for name in CONTENDERS
            if (spread := column.figure(cell, name)) is not None
        ]
        if len(rows) < 2 or any(row.spread.median <= 0 for row in rows):
            return ""
        question = CASES[cell.case].question
        title = f"{question} {cell.name}"
        name = _slug(f"{cell.case}-{cell.name}")
        return self._shown(name, title, bars(title, column.head, rows))

    def lines(self, name: str, title: str, cells: list[CellResults], unit: str) -> str:
        """A line for each contender over the cells."""
        column = SECTIONS[0].columns[0]
        points: dict[str, list[tuple[float, float]]] = {}
        for cell in cells:
            size = (
                cell.nbytes / GIB if unit == "GiB" else float(cell.workload.num_tensors)
            )
            for contender in cell.measured:
                spread = column.figure(cell, contender)
                if spread is not None:
                    row = points.setdefault(contender, [])
                    row.append((float(f"{size:.2g}"), spread.median))
        ordered = [
            Line(each, points[each])
            for each in sorted(points, key=lambda each: not each.startswith("aiockpt"))
        ]
        if not any(len({x for x, _ in line.points}) > 1 for line in ordered):
            return ""
        return self._shown(name, title, lines(title, (unit, column.head), ordered))

    def _shown(self, name: str, title: str, drawing: str) -> str:
        path = self._plots / f"{name}.svg"
        path.write_text(drawing, encoding="utf-8")
        return f"![{title}]({path.relative_to(self._page.parent)})\n\n"


def _kind(name: str) -> str:
    if CONTENDERS[name].is_reference:
        return "limit"
    return "ours" if name.startswith("aiockpt") else "other"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _contenders(results: Results) -> str:
    lines = [
        "## Contenders\n",
        "| contender | when its save has ended | runs here |",
        "|---|---|---|",
    ]
    asked = {
        name
        for case in CASES.values()
        for cell in case.cells(Scale.FULL)
        for name in cell.contenders
        if not case.needs_gpu
    }
    for name, contender in CONTENDERS.items():
        cells: list[Any] = list(results.cells.values())
        reasons = {cell.reasons[name] for cell in cells if name in cell.reasons}
        is_measured = any(name in cell.measured for cell in cells)
        words = ["yes"] if is_measured else []
        if name not in asked:
            words = ["asked only where there is a GPU"]
        words += [f"not everywhere: {_plain(reason)}" for reason in sorted(reasons)]
        lines.append(
            f"| {name} | {contender.durability} | {'; '.join(words) or 'not asked'} |"
        )
    lines += [f"| {name} | – | {reason} |" for name, reason in ELSEWHERE.items()]
    return "\n".join(lines) + "\n"


def _plain(reason: str) -> str:
    return reason.replace("|", "\\|").replace("<", "&lt;")
