"""The results of `bench/deepspeed_saves.py`, which has its own program and file."""

__all__ = ["section"]

import json
from pathlib import Path
from typing import Any

_FIGURES = ("save", "steps after", "save and steps after", "plain step")


def section(directory: Path) -> str:
    """A table of the newest `deepspeed_*.jsonl`; nothing where there is none."""
    paths = sorted(directory.glob("deepspeed_*.jsonl"), key=_when)
    if not paths:
        return ""
    path = paths[-1]
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    told: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = told.setdefault(line["contender"], {})
        row[line.get("figure", "does_not_run")] = line
    rows = "".join(_row(name, row) for name, row in told.items())
    case = head["case"]
    return (
        "## DeepSpeed\n\nZeRO-3 jobs, by checkpoint engine: seconds inside "
        "`save_checkpoint`, and those that the steps after it take longer than plain "
        f"ones. {case['ranks']} ranks, {case['mib']} MiB of optimizer state, "
        f"n = {case['repeats']}, from [`{path.name}`](results/{path.name}.txt) at "
        f"commit `{head['machine']['commit']}`.\n\n"
        f"| engine | {' | '.join(f'{each}, s' for each in _FIGURES)} "
        "| durable when the steps had ended |\n"
        f"|---|{'---:|' * (len(_FIGURES) + 1)}\n{rows}\n"
    )


def _row(name: str, row: dict[str, Any]) -> str:
    if "does_not_run" in row:
        reason = row["does_not_run"]["does_not_run"].replace("|", "/")
        return f"| {name} | does not run: {reason} |{' |' * len(_FIGURES)}\n"
    cells = [
        f"{row[each]['median']:.2f} ({row[each]['min']:.2f}–{row[each]['max']:.2f})"
        if each in row
        else "–"
        for each in _FIGURES
    ]
    return f"| {name} | {' | '.join(cells)} | {_durable(row.get('is durable'))} |\n"


def _durable(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    words = {(1, 1): "always", (0, 0): "never"}
    return words.get((figure["min"], figure["max"]), "not always")


def _when(path: Path) -> str:
    """The date in a name: `deepspeed_2cores_20261128_COMMIT.jsonl`."""
    return path.name.split("_")[2]
