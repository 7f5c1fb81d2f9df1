"""Fuzzes one target with atheris: `run_atheris.py TARGET --seconds N`.

The corpus is made of the target's seeds, in a directory that is removed again. The
exit status is that of libFuzzer: 0 if nothing was found; else the traceback and the
input that led to it are printed. With `--faults-report PATH` the inputs that were tried
are added to the counts of the fault matrix there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

TESTS = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", help="where libFuzzer works; for the process below")
    parser.add_argument("--faults-report", type=Path, metavar="PATH")
    options = parser.parse_args()
    if options.corpus is not None:
        fuzz(options.target, options.seconds, options.corpus)
    # libFuzzer ends its process, and would leave the corpus behind.
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, __file__, options.target]
        command += ["--seconds", str(options.seconds), "--corpus", corpus]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if options.faults_report is not None:
        with options.faults_report.open("a", encoding="utf-8") as report:
            print(json.dumps(counted(options, done)), file=report)
    return done.returncode


def counted(
    options: argparse.Namespace, done: "subprocess.CompletedProcess[str]"
) -> dict[str, object]:
    """The inputs that were tried, as a line of the fault matrix."""
    told = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    num_tried = int(told[1]) if told else 0
    return {
        "row": 16,
        "name": "hostile files",
        "fault": f"fuzzed by atheris, {options.target}",
        "cases": num_tried,
        "survived": max(num_tried - (done.returncode != 0), 0),
        "run": f"{options.seconds} s",
    }


def fuzz(name: str, seconds: int, directory: str) -> None:
    """Fuzzes until the time is over or something is found; does not return."""
    sys.path.insert(0, str(TESTS))
    with atheris.instrument_imports(
        include=[
            "aiockpt.formats",
            "aiockpt.outline",
            "aiockpt.loading",
            "aiockpt.loader",
            "aiockpt.manifest",
        ]
    ):
        from hostile.fuzzing import TARGETS

    target = TARGETS[name]
    corpus = Path(directory, "corpus")
    corpus.mkdir()
    for index, seed in enumerate(target.seeds):
        (corpus / f"seed-{index}").write_bytes(seed)
    os.chdir(directory)
    arguments = [
        f"-max_total_time={seconds}",
        "-max_len=8192",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        "-verbosity=1",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *arguments], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
