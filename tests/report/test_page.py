"""The report: what the page holds, and how Chromium shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from slimplus.report.charts import charts, layer_block, layer_kind
from slimplus.report.page import evaluation_table, headline, recipe_differences, render, write_report
from slimplus.report.run_files import events, read_runs
from slimplus.utils.errors import InputError
from tests.support.runs import read_metrics

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second run to compare: the first one with another method, seed and perplexity, and with an event."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(finished, folder)
    metrics = read_metrics(folder) | {"method": "gptq"}
    metrics["perplexity"]["quantized"] = metrics["texts"][0]["perplexity"]["quantized"] = 7777.125
    metrics["blocks"][1]["events"] = ["<b>damping</b> was raised"]
    (folder / "metrics.json").write_text(json.dumps(metrics))
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("\nseed: 0", "\nseed: 3"))
    return folder


class Parts(HTMLParser):
    """Ids of the sections, number of the charts, addresses of what a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.charts = 0
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[key] or "" for key in ("src", "href") if key in values]
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.charts += values.get("class") == "chart"


def test_a_run_ends_with_its_report(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page == render(read_runs([finished]))
    metrics = read_metrics(finished)
    for text in (
        f"{metrics['perplexity']['quantized']:.2f}",
        f"{metrics['average_bits']:.3f}",
        metrics["libraries"]["torch"],
        json.loads((finished / "fingerprint.json").read_text())["tokenizer"],
        "slimllm_plus",
        f"recipe={finished}/recipe.yaml",
        "group_size: 16",
    ):
        assert text in page, text


def test_every_section_is_there_and_nothing_is_loaded(finished: Path) -> None:
    parts = Parts((finished / "report.html").read_text())
    assert parts.sections == [
        *("headline", "evaluation", "sample", "bits", "bytes", "errors", "curves", "resources", "events"),
        *("recipe", "versions"),
    ]
    assert parts.charts == 6  # bits, bytes, errors, curves, time, memory
    assert parts.addresses == []


def test_the_map_shows_the_bits_of_the_allocation(finished: Path) -> None:
    (run,) = read_runs([finished])
    (chart,) = [chart for chart in charts([run]) if chart.section == "bits"]
    (heatmap,) = chart.figure.data
    allocation = json.loads((finished / "allocation.json").read_text())["bits"]
    assert [kinds[0] for kinds in heatmap.customdata[0]] == [layer_kind(name) for name in list(allocation)[:7]]
    for row, cells in enumerate(heatmap.z):
        for kind, bits, (_, groups) in zip(heatmap.x, cells, heatmap.customdata[row], strict=True):
            (widths,) = [bits for name, bits in allocation.items() if f".{row}." in name and name.endswith(kind)]
            assert bits == pytest.approx(sum(widths) / len(widths))
            assert f"{widths.count(2)} groups of 2 bits" in groups


def test_the_map_of_sensitivities_shows_the_sums_over_the_groups(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    names = json.loads((finished / "allocation.json").read_text())["bits"]
    tables = {name: (index + 1) * np.array([[8, 8], [1, 3], [0.5, 0.5], [0, 0]]) for index, name in enumerate(names)}
    save_file(tables | {"channels": np.ones((2, 64))}, copy / "sensitivity.safetensors")
    (run,) = read_runs([copy])
    (chart,) = [chart for chart in charts([run]) if chart.section == "sensitivity"]
    (heatmap,) = chart.figure.data
    shown = [10**value for row in heatmap.z for value in row]
    assert shown == pytest.approx([4 * (index + 1) for index in range(len(names))])
    assert heatmap.customdata[0][0] == [
        layer_kind(next(iter(names))),
        "1 bits: 16<br>2 bits: 4<br>3 bits: 1<br>4 bits: 0",
    ]
    assert "at 2 bits" in chart.title
    assert Parts(render([run])).sections[3:5] == ["bits", "sensitivity"]
    (copy / "sensitivity.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"sensitivity\.safetensors is damaged .*start the run again"):
        read_runs([copy])


def test_the_bytes_add_up(finished: Path) -> None:
    (run,) = read_runs([finished])
    (chart,) = [chart for chart in charts([run]) if chart.section == "bytes"]
    assert chart.figure.layout.xaxis.title.text == "kB"
    shown = sum(value for bar in chart.figure.data for value in bar.x) * 1e3
    assert shown == pytest.approx(read_metrics(finished)["size_bytes"])


def test_errors_and_curves_are_those_of_the_logs(finished: Path) -> None:
    (run,) = read_runs([finished])
    blocks = read_metrics(finished)["blocks"]
    (errors,) = [chart for chart in charts([run]) if chart.section == "errors"]
    before, after = errors.figure.data
    assert list(before.y) == [block["calibrated_loss"] for block in blocks]
    assert list(after.y) == [block["loss"] for block in blocks]
    assert [(curve.name, curve.epochs) for curve in run.curves] == [("block_000", (1, 2)), ("block_001", (1, 2))]
    assert all(0 < loss < 1 for curve in run.curves for loss in curve.losses)


def test_a_comparison_shows_both_runs(finished: Path, other: Path) -> None:
    runs = read_runs([finished, other])
    assert [run.name for run in runs] == ["plus", "other"]
    assert dict(headline(runs))["method"] == ["slimllm_plus", "gptq"]
    assert recipe_differences(runs) == [("seed", ["0", "3"])]
    header, _, second = evaluation_table(runs)
    assert dict(zip(header, second, strict=True))["perplexity, quantized"] == "7777.12"
    assert second[0] == "other"
    page = render(runs)
    assert Parts(page).charts == 1 + 2 + 2 + 1 + 2 + 2
    assert "&lt;b&gt;damping&lt;/b&gt; was raised" in page
    assert "<b>damping" not in page
    assert events(runs[1].metrics) == [("block 1", "<b>damping</b> was raised")]


def test_a_run_that_has_just_begun_has_a_report(finished: Path, tmp_path: Path) -> None:
    metrics = read_metrics(finished)
    known = ("method", "model", "precision", "libraries", "machine", "evaluation")
    begun = {key: metrics[key] for key in known} | {"perplexity": {}, "seconds": {}, "events": []}
    (tmp_path / "metrics.json").write_text(json.dumps(begun))
    for file in ("recipe.yaml", "fingerprint.json"):
        shutil.copy(finished / file, tmp_path)
    write_report([tmp_path], tmp_path / "report.html")
    parts = Parts((tmp_path / "report.html").read_text())
    assert parts.sections == ["headline", "evaluation", "events", "recipe", "versions"]


def test_a_log_cut_short_is_read_as_far_as_it_goes(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    log = copy / "logs/csv/block_001/metrics.csv"
    rows = log.read_text().splitlines(keepends=True)
    log.write_bytes(("".join(rows[:-1]) + "1,,0.1").encode() + b"\xff\n" + b"x" * 200_000)
    assert read_runs([copy])[0].curves[1].epochs[0] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", "{"),
        ("metrics.json", "[]"),
        ("metrics.json", "{}"),
        ("recipe.yaml", "a: [\n"),
        ("recipe.yaml", "seed: 0\n"),
        ("recipe.yaml", ""),
        ("allocation.json", '{"bits": 5}'),
    ],
)
def test_damaged_files_are_said(finished: Path, tmp_path: Path, name: str, content: str) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    (copy / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name} is damaged \(.*\); start the run again"):
        read_runs([copy])


def test_a_folder_that_is_no_run_is_said(packed: Path) -> None:
    with pytest.raises(InputError, match=r"packed is no run directory: metrics\.json is missing; give the run_dir"):
        read_runs([packed])


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", 11, "self_attn.q_proj"),
        ("model.layers.3.mlp.experts.17.up_proj", 3, "mlp.experts.*.up_proj"),
        ("transformer.h.0.attn.c_attn", 0, "attn.c_attn"),
    ],
)
def test_layers_go_by_block_and_kind(name: str, block: int, kind: str) -> None:
    assert (layer_block(name), layer_kind(name)) == (block, kind)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_chromium_draws_every_chart_and_complains_of_nothing(finished: Path, other: Path, tmp_path: Path) -> None:
    file = tmp_path / "comparison.html"
    write_report([finished, other], file)
    for page, count in ((finished / "report.html", 6), (file, 10)):
        dom, log = open_in_chromium(page, tmp_path)
        assert re.findall(r".*CONSOLE.*", log) == []
        assert dom.count('class="chart js-plotly-plot"') == count
        assert dom.count('class="plot-container plotly"') == count


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_an_error_of_the_page_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<script>nothing.at.all</script>")
    assert "CONSOLE" in open_in_chromium(tmp_path / "page.html", tmp_path)[1]


def open_in_chromium(page: Path, folder: Path) -> tuple[str, str]:
    """What a page has become once its scripts have run, and what the browser said of it."""
    assert CHROMIUM is not None
    options: tuple[str, ...] = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000")
    options += ("--enable-logging=stderr", "--dump-dom", f"--user-data-dir={folder / 'profile'}")
    done = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr
