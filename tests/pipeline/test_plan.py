"""The plan of a run, from shapes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimplus.pipeline.plan import dry_run
from slimplus.recipe.parsing import load_recipe
from slimplus.utils.errors import InputError
from tests.support.recipes import Arguments
from tests.support.runs import read_metrics


def test_dry_run_of_llama7b_needs_no_network() -> None:
    plan = dry_run(load_recipe(["recipe=llama7b_2bit", "dry_run=true"]))
    assert "13.48 GB at 16 bit -> 2.30 GB packed" in plan
    for expected in ("blocks                     32", "linear layers              224", "2.18"):
        assert expected in plan


def test_the_plan_of_a_size_has_that_size() -> None:
    keys = ("quantization.allocation=model", "quantization.size_bytes=1_900_000_000", "dry_run=true")
    plan = dry_run(load_recipe(["recipe=llama7b_2bit", *keys]))
    assert "average bits               as many as fit the size" in plan
    assert "-> 2.42 GB packed" in plan
    assert f"effective bits per weight  {8 * 1.9e9 / 6_476_005_376:.3f}" in plan


def test_the_plan_of_a_size_that_no_widths_take_is_what_they_take() -> None:
    keys = ("quantization.allocation=model", "quantization.widths=[2,4]", "quantization.size_bytes=90_000_000_000")
    four = ("quantization.allocation=uniform", "quantization.bits=4")
    plans = [dry_run(load_recipe(["recipe=llama7b_2bit", *each, "dry_run=true"])) for each in (keys, four)]
    sizes = [next(line for line in plan.splitlines() if line.startswith("size")) for plan in plans]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            "quantization.size_bytes=500_000_000",
            r"quantization\.size_bytes: .* cost .* and the budget is 500,000,000",
        ),
        (
            "quantization.widths=[1,4]",
            r"quantization\.widths: .*\[1, 2, 3, 4\]",
        ),
        (
            "data.sequence_length=4096",
            r"data\.sequence_length: 4096 tokens are more than the model takes; give at most 2048",
        ),
        ("data.evaluation.sequence_length=4096", r"data\.evaluation\.sequence_length: 4096 tokens"),
    ],
)
def test_what_the_shapes_do_not_allow_is_said_before_any_work(keys: str, said: str) -> None:
    recipe = load_recipe(["recipe=llama7b_2bit", "dry_run=true", "quantization.allocation=model", *keys.split()])
    with pytest.raises(InputError, match=said):
        dry_run(recipe)


def test_8_bit_scales_make_the_plan_smaller() -> None:
    plan = dry_run(load_recipe(["recipe=llama7b_2bit", "quantization.scale_bits=8", "dry_run=true"]))
    assert "effective bits per weight  2.127" in plan


def test_training_the_whole_model_takes_all_of_it_on_the_device() -> None:
    chosen = ("epochs=0", "epochs=1", "activation_checkpointing=true")
    keys = [["end_to_end.epochs=1", f"end_to_end.{key}", "dry_run=true"] for key in chosen]
    plans = [dry_run(load_recipe(["recipe=llama7b_2bit", *each])) for each in keys]
    blocks, whole, recomputed = (float(plan.rpartition("there is one, ")[2].split(" GB")[0]) for plan in plans)
    assert blocks < recomputed < 6.48 * 4 < whole  # its 6.48 billion weights stay packed, its activations do not


@pytest.mark.parametrize("recipe", ["llama7b_3bit", "llama2_7b_2bit", "llama3_8b_2bit", "opt_1.3b_2bit"])
def test_dry_run_of_the_paper_models(recipe: str) -> None:
    assert "times smaller" in dry_run(load_recipe([f"recipe={recipe}", "dry_run=true"]))


BOTH = ("quantization.embedding_bits=8", "quantization.head_bits=4")


def test_llama7b_gets_past_six_times() -> None:
    plan = dry_run(load_recipe(["recipe=llama7b_2bit", "dry_run=true", *BOTH]))
    assert "13.48 GB at 16 bit -> 1.97 GB packed (6.8 times smaller)" in plan
    assert "GB in run_dir, besides the 13.48 GB of the model itself" in plan
    assert "model.embed_tokens 8 bits, lm_head 4 bits, 532.5 kB at 16 bit" in plan


def test_the_plan_of_an_imported_allocation_is_that_of_its_widths(
    finished: Path, arguments: Arguments, tmp_path: Path
) -> None:
    file, metrics = finished / "allocation.json", read_metrics(finished)
    plan = dry_run(load_recipe(arguments(tmp_path, f"quantization.allocation={file}", "quantization.bits=4")))
    assert "average bits               2.000" in plan
    assert f"effective bits per weight  {metrics['bits_per_weight']:.3f}" in plan
    with pytest.raises(InputError, match=r"is for group_size 16, not 64"):
        dry_run(load_recipe(arguments(tmp_path, f"quantization.allocation={file}", "quantization.group_size=64")))
