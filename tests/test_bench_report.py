"""What the page of the benchmarks says of results that are not all alike."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

MACHINE = {
    "cores": 2,
    "memory_gib": 8.0,
    "processor": "one",
    "kernel": "6",
    "torch": "2",
    "commit": "abc",
    "file_system": "ext4",
}
WORKLOAD = {"nbytes": 1 << 20, "num_tensors": 20, "spread": 1, "is_nested": False}


def written(
    path: Path, *failures: dict[str, str], cell: str = "1 GiB", **machine: object
) -> Path:
    """A file of results: one cell of the case `checksum`, of one of its contenders."""
    about = {"case": "checksum", "cell": cell}
    told = [
        {"machine": MACHINE | machine, "scale": "tiny", "cases": ["checksum"]},
        {**about, "workload": WORKLOAD, "options": {}, "settings": {}, "repeats": 1},
        {
            **about,
            "contender": "aiockpt",
            "repeat": 1,
            "is_warm_up": False,
            "measured": {"durable_s": 1.0, "save_s": 1.0},
        },
        *({**about, **each} for each in failures),
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in told))
    return path


def page_of(*results: Path, docs: Path) -> subprocess.CompletedProcess[str]:
    docs.mkdir()
    command = [sys.executable, "-m", "bench.report", *map(str, results)]
    return subprocess.run(
        [*command, "--docs", str(docs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_newer_file_that_tells_more_of_the_machine_stands_beside_an_older(
    tmp_path: Path,
) -> None:
    old = written(tmp_path / "old.jsonl")
    more = {"file_system": "ext4 (rw) on vda", "huge_pages": "never"}
    new = written(
        tmp_path / "new.jsonl",
        {"contender": "raw O_DIRECT", "failed": "its process has died"},
        {"failed": "the disk was full"},
        **more,
    )
    docs = tmp_path / "docs"
    assert page_of(old, new, docs=docs).returncode == 0
    page = (docs / "performance.md").read_text(encoding="utf-8")
    # What was not measured is there, by cell and contender, with the reason.
    raw = "raw O_DIRECT (its process has died)"
    cut = "aiockpt, checksums cut out"
    assert f"- checksum: 1 GiB: {raw}, {cut} (the disk was full)\n" in page
    assert "- throughput: 4 GiB\n" in page


def test_a_run_that_was_stopped_in_a_case_hides_no_cell_of_an_older(
    tmp_path: Path,
) -> None:
    old = written(tmp_path / "old.jsonl")
    new = written(tmp_path / "new.jsonl", cell="2 GiB", commit="def")
    docs = tmp_path / "docs"
    assert page_of(old, new, docs=docs).returncode == 0
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert "\n### 1 GiB\n" in page
    assert "\n### 2 GiB\n" in page
    assert "commit `abc`: checksum (1 GiB); " in page
    assert "commit `def`: checksum (2 GiB)." in page


def test_results_of_two_machines_do_not_stand_on_one_page(tmp_path: Path) -> None:
    old = written(tmp_path / "old.jsonl", cores=64)
    new = written(tmp_path / "new.jsonl")
    ran = page_of(old, new, docs=tmp_path / "docs")
    assert ran.returncode != 0
    assert "not of the machine" in ran.stderr
