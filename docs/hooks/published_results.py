"""Publish `benchmarks/results/` beside the pages, which link to it as they do in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the files of `benchmarks/results/` to the site."""
    root = Path(config.config_file_path).parent
    for file in sorted((root / FOLDER).iterdir()):
        files.append(File.generated(config, f"{FOLDER}/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page with its links to `../benchmarks/results/` leading to the published files."""
    return markdown.replace(f"](../{FOLDER}/", f"]({FOLDER}/")
