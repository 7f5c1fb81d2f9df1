"""Shows: `python -m bench.report [RESULTS.jsonl ...]` writes `docs/performance.md`."""

import argparse
import sys
from pathlib import Path

from bench.report import page
from bench.report.results import read
from bench.workloads import Scale

_ROOT = Path(__file__).parents[2]


def main() -> None:
    """Writes the page of some result files, by default of all that are kept.

    Of a case that was measured several times the last stands there.
    """
    parser = argparse.ArgumentParser(prog="bench.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--docs", type=Path, default=_ROOT / "docs")
    arguments = parser.parse_args()
    results = read(arguments.results, _ROOT / "bench" / "results")
    plots = arguments.docs / "assets" / "performance"
    page.write(results, arguments.docs / "performance.md", plots)
    if results.missing and results.scale == Scale.FULL:
        listed = "\n".join(results.missing)
        sys.exit(f"not measured:\n{listed}")
    print(f"{results.path.name} → {arguments.docs / 'performance.md'}", file=sys.stderr)


if __name__ == "__main__":
    main()
