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
    path: Path,
    *failures: dict[str, str],
    case: str = "checksum",
    cell: str = "1 GiB",
    **machine: object,
) -> Path:
    """A file of results: one cell of a case, of one of its contenders."""
    about = {"case": case, "cell": cell}
    told = [
        {"machine": MACHINE | machine, "scale": "tiny", "cases": [case]},
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


def figured(path: Path, gib: float, **medians: float) -> None:
    """A file of `bench/gpu.py`, with some of its figures."""
    machine = MACHINE | {"device": "NVIDIA H200"}
    told: list[object] = [{"machine": machine, "case": {"gib": gib}}]
    for name, median in medians.items():
        about = {"figure": name, "median": median, "min": 0.0, "max": 9.0, "unit": "s"}
        told.append(about)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in told))


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


def test_what_was_measured_on_a_gpu_stands_beside_its_targets(tmp_path: Path) -> None:
    told = {
        "staging/raw": 0.96,
        "durable/raw": 0.94,
        "stall, step after 1 s": 0.001,
        "restore from disk, cold, into/raw": 1.5,
        "share of the file cached, cold": 0.9,
    }
    figured(tmp_path / "gpu_16cores_20261129T1000_abc.jsonl", 4.0, **told)
    page = tmp_path / "docs" / "performance.md"
    assert page_of(written(tmp_path / "cpu.jsonl"), docs=page.parent).returncode == 0
    rows = {
        line.split("|")[1].strip(): line
        for line in page.read_text(encoding="utf-8").splitlines()
        if "| one H100 or H200 |" in line
    }
    assert "s | met: [`gpu_16cores" in rows["device-to-host staging"]
    assert "s | **missed**: [`gpu_16cores" in rows["durable throughput"]
    # A target for 20 GB is neither met nor missed by less.
    assert "| of 4.3 GB: " in rows["stall per 20 GB save, lazy"]
    assert "| not cold: " in rows["restore from disk"]
    assert "| not measured: [`gpu_16cores" in rows["step inflation while copying"]


def test_peers_on_a_gpu_have_a_section_with_their_machine(tmp_path: Path) -> None:
    theirs = tmp_path / "gpupeers_16cores_20261129T1000_def.jsonl"
    written(theirs, case="gpu_save", cell="2 GiB", cores=16, commit="def")
    page = tmp_path / "docs" / "performance.md"
    assert page_of(written(tmp_path / "cpu.jsonl"), docs=page.parent).returncode == 0
    before, _, after = page.read_text(encoding="utf-8").partition("## On a GPU\n")
    assert "Measured on 2 cores" in before
    assert "needs a GPU, and was not run" in before
    assert "gpu_save" not in before
    assert "Measured on 16 cores" in after
    assert "commit `def`" in after
    assert "## Stall of a trainer on a GPU" in after
    # Of that machine only what belongs to GPUs is missed.
    assert "- gpu_load: 2 GiB\n" in after
    assert "- throughput: 4 GiB\n" not in after
