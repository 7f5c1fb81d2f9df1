"""Files of the repository that are pages, or linked from pages, of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
RESULTS = ROOT / "bench" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them where the pages expect them."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    for result in sorted(RESULTS.glob("*.jsonl")):
        # As text, so that a browser shows it.
        name = f"results/{result.name}.txt"
        files.append(File.generated(config, name, abs_src_path=str(result)))
    return files
