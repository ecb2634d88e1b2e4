"""The documentation as a site: it builds without a warning, and its pages load nothing from other hosts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from slimplus.recipe.parsing import recipe_names
from slimplus.recipe.schema import keys

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
NOT_LOADED = {"canonical", "prev", "next"}  # kinds of <link> that say where something is


class Loads(HTMLParser):
    """Collects the addresses that a browser fetches for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADED and values.get("rel") not in NOT_LOADED:
            self.addresses.append(values.get(LOADED[tag]) or "")


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not with --quiet: mkdocs then counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loads = Loads()
        loads.feed(text)
        assert [address for address in loads.addresses if re.match(r"(https?:)?//", address)] == [], page.name
        assert 'class="mermaid"' not in text, f"{page.name}: what draws mermaid diagrams comes from another host"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_every_recipe_and_key_is_on_the_page_of_recipes(site: Path) -> None:
    page = (site / "recipes.html").read_text(encoding="utf-8")
    assert [name for name in recipe_names() if f"recipes/{name}.yaml" not in page] == []
    assert [key for key in keys() if f'id="{key}"' not in page] == []


@pytest.mark.slow
def test_the_floors_hold_every_part(site: Path) -> None:
    page = (site / "architecture.html").read_text(encoding="utf-8")
    folders = [folder.name for folder in (ROOT / "slimplus").iterdir() if (folder / "__init__.py").is_file()]
    assert folders
    parts = [*folders, "kernels", "benchmarks"]
    assert [part for part in [*parts, "train"] if f">{part}</text>" not in page] == []
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [part for part in parts if f"`{part}` |" not in table] == []


@pytest.mark.slow
def test_results_are_published_where_pages_link_to_them(site: Path) -> None:
    for file in (ROOT / "benchmarks" / "results").iterdir():
        assert (site / "benchmarks" / "results" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    """What the success of the other builds says depends on it."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("benchmarks", "kernels", "slimplus", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    assert "nowhere.md" in built.stdout + built.stderr


def test_links_in_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text)
    local = [one or other for one, other in links if not re.match(r"https?:", one or other)]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_demo_s_summary_is_that_of_a_measured_run() -> None:
    """Its figures are those of a row of benchmarks/results/recipes.json."""
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"summary\.txt\"\n(.*?)\n\n", page, re.DOTALL)
    rows = json.loads((ROOT / "benchmarks" / "results" / "recipes.json").read_text())["rows"]
    summaries = [
        [
            f"{row['perplexity']['full']:.2f} full precision, {row['perplexity']['quantized']:.2f} quantized",
            f"{row['average_bits']:.3f}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['size_bytes'] / 1e6:.1f} MB, {row['full_size_bytes'] / row['size_bytes']:.2f} times smaller",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in row["seconds"].items()),
        ]
        for row in rows
        if row["recipe"] == "smollm2_135m_2bit"
    ]
    assert any(all(figure in shown for figure in figures) for figures in summaries), shown
