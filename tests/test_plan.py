"""The plan of a run, from shapes alone."""

from __future__ import annotations

import pytest

from slimplus import pipeline
from slimplus.reading import load_recipe


def test_dry_run_of_llama7b_needs_no_network() -> None:
    plan = pipeline.dry_run(load_recipe(["recipe=llama7b_2bit", "dry_run=true"]))
    assert "13.48 GB at 16 bit -> 2.30 GB packed" in plan
    for expected in ("blocks                     32", "linear layers              224", "2.18"):
        assert expected in plan


def test_the_plan_of_a_size_has_that_size() -> None:
    keys = ("quantization.allocation=model", "quantization.size_bytes=1_900_000_000", "dry_run=true")
    plan = pipeline.dry_run(load_recipe(["recipe=llama7b_2bit", *keys]))
    assert "average bits               as many as fit the size" in plan
    assert "-> 2.42 GB packed" in plan
    assert f"effective bits per weight  {8 * 1.9e9 / 6_476_005_376:.3f}" in plan


def test_8_bit_scales_make_the_plan_smaller() -> None:
    plan = pipeline.dry_run(load_recipe(["recipe=llama7b_2bit", "quantization.scale_bits=8", "dry_run=true"]))
    assert "effective bits per weight  2.127" in plan


@pytest.mark.parametrize("recipe", ["llama7b_3bit", "llama2_7b_2bit", "llama3_8b_2bit", "opt_1.3b_2bit"])
def test_dry_run_of_the_paper_models(recipe: str) -> None:
    assert "times smaller" in pipeline.dry_run(load_recipe([f"recipe={recipe}", "dry_run=true"]))
