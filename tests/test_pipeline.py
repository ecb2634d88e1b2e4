"""The whole job on tiny models: what it writes, what it skips, what it refuses, and that what it ships loads back."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Arguments, ModelMaker
from safetensors.torch import load_file

import slimplus
from slimplus.models.architectures import BLOCKS
from slimplus.nn import PackedLinear
from slimplus.pipeline import run as pipeline
from slimplus.pipeline.plan import dry_run
from slimplus.recipe.parsing import load_recipe
from slimplus.recipe.schema import to_yaml
from slimplus.utils.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def run(arguments: list[str]) -> str:
    summary = pipeline.run(load_recipe(arguments))
    assert summary is not None
    return summary


def _metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def _packed_layers(model: torch.nn.Module) -> dict[str, PackedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def test_what_a_run_writes(finished: Path, arguments: Arguments) -> None:
    metrics = _metrics(finished)
    assert metrics["average_bits"] == 2.0
    assert metrics["bits_per_weight"] > 2.0
    assert set(metrics["perplexity"]) == {"full", "quantized"}
    assert set(metrics["seconds"]) == {"full_precision", "blocks", "export", "packed"}
    stored = sum(t.nbytes for t in load_file(finished / "packed" / "model.safetensors").values())
    assert metrics["size_bytes"] == stored
    assert metrics["compression"] == pytest.approx(metrics["full_size_bytes"] / stored)
    assert metrics["peak_memory_bytes"] > 1e8
    assert load_recipe([f"recipe={finished / 'recipe.yaml'}"]) == load_recipe(arguments(finished))
    assert "2.000" in (finished / "summary.txt").read_text()
    with (finished / "logs/csv/block_001/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row["grad_norm"] for row in rows)
    assert any(row["lr-AdamW"] for row in rows)
    assert not list(finished.rglob("*.tmp"))
    assert not (finished / "checkpoints" / "block_000").exists()


def test_model_card(finished: Path) -> None:
    card = (finished / "packed" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "transformers"
    metrics = _metrics(finished)
    assert f"{metrics['perplexity']['quantized']:.2f}" in body
    assert "slimllm_plus" in body
    assert to_yaml(load_recipe([f"recipe={finished / 'recipe.yaml'}"])) in body


def test_allocation_is_readable_and_exact(finished: Path) -> None:
    allocation = json.loads((finished / "allocation.json").read_text())
    assert len(allocation["bits"]) == 14
    for widths in allocation["bits"].values():
        assert sum(widths) == 2 * len(widths)
    assert any(width != 2 for widths in allocation["bits"].values() for width in widths)
    quantization = json.loads((finished / "packed/config.json").read_text())["quantization_config"]
    for name, widths in allocation["bits"].items():
        assert quantization["modules"][name] == {str(width): widths.count(width) for width in set(widths)}
    assert quantization["shapes"].keys() == allocation["bits"].keys()
    assert quantization["shapes"]["model.layers.0.mlp.down_proj"] == [64, 160]


def test_loaded_weights_are_those_of_the_blocks(finished: Path) -> None:
    model = slimplus.load(finished / "packed")
    layers = _packed_layers(model)
    assert len(layers) == 14
    for name, layer in layers.items():
        _, _, index, inner = name.split(".", 3)
        stored = load_file(finished / "blocks" / f"block_{int(index):03d}.safetensors")
        own = {key.removeprefix(f"{inner}."): t for key, t in stored.items() if key.startswith(f"{inner}.")}
        original = PackedLinear.from_tensors(own, layer.in_features, layer.out_features, layer.group_size)
        assert torch.equal(layer.dequantize(), original.dequantize())
        assert layer.scales.dtype == torch.float16


def test_loaded_model_computes_what_dense_weights_would(finished: Path) -> None:
    packed, dense = (slimplus.load(finished / "packed", dtype=torch.float32) for _ in range(2))
    for name, layer in _packed_layers(dense).items():
        dense.set_submodule(name, layer.to_linear())
    tokens = torch.randint(1, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
        half = slimplus.load(finished / "packed", dtype=torch.bfloat16)(tokens).logits.float()
        torch.testing.assert_close(half, dense(tokens).logits, rtol=0.05, atol=0.3)


def test_save_pretrained_round_trips(finished: Path, tmp_path: Path) -> None:
    model = slimplus.load(finished / "packed")
    model.save_pretrained(tmp_path)
    again = slimplus.load(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


def test_from_pretrained_in_a_fresh_process(finished: Path, tmp_path: Path) -> None:
    code = f"""
import slimplus
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(finished / "packed")!r})
tokenizer = AutoTokenizer.from_pretrained({str(finished / "packed")!r})
written = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert written.shape == (1, 8), written.shape
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PackedLinear"
"""
    # Transformers first, then this package, must work as well.
    for order in (code, f"import transformers.quantizers\n{code}"):
        subprocess.run([sys.executable, "-c", order], cwd=tmp_path, check=True, timeout=120)


def test_load_refuses_what_is_not_packed(make_model: ModelMaker) -> None:
    with pytest.raises(InputError, match="not a packed slimplus checkpoint"):
        slimplus.load(make_model("llama"))


def test_a_second_run_skips_what_is_done(
    finished: Path, arguments: Arguments, caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}
    caplog.set_level(logging.INFO, "slimplus")
    run(arguments(finished))
    assert caplog.text.count("skipped") == 4
    assert "2 of 2" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "blocks").iterdir()}


def test_another_evaluation_text_is_measured_anew(
    finished: Path, arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    caplog.set_level(logging.INFO, "slimplus")
    run(arguments(copy, "data.evaluation.windows=3"))
    assert _metrics(copy)["perplexity"] != _metrics(finished)["perplexity"]
    assert "2 of 2" in caplog.text


def test_changed_inputs_are_refused(finished: Path, arguments: Arguments) -> None:
    changes = r"quantization\.percdamp 0\.01 -> 0\.1, seed 0 -> 1; restore them, .* resume\.force=true"
    with pytest.raises(InputError, match=rf"run_dir: .* made with other values: {changes}"):
        run(arguments(finished, "quantization.percdamp=0.1", "seed=1", "data.samples=8"))


def test_resume_never_refuses_a_used_folder(finished: Path, arguments: Arguments) -> None:
    with pytest.raises(InputError, match="is not empty"):
        run(arguments(finished, "resume=never"))


def test_an_allocation_can_be_imported(finished: Path, arguments: Arguments, tmp_path: Path) -> None:
    file = finished / "allocation.json"
    run(arguments(tmp_path / "gptq", f"quantization.allocation={file}", "quantization.method=gptq"))
    assert json.loads((tmp_path / "gptq/allocation.json").read_text()) == json.loads(file.read_text())
    assert _metrics(tmp_path / "gptq")["events"] == []


def test_an_imported_allocation_of_another_average_is_noted(
    finished: Path, arguments: Arguments, tmp_path: Path
) -> None:
    allocation = f"quantization.allocation={finished / 'allocation.json'}"
    run(arguments(tmp_path, allocation, "quantization.bits=3", "quantization.method=rtn"))
    assert _metrics(tmp_path)["average_bits"] == 2
    (event,) = _metrics(tmp_path)["events"]
    assert event == "quantization.allocation gives 2.000 bits on average, not quantization.bits=3"


def test_the_plan_of_an_imported_allocation_is_that_of_its_widths(
    finished: Path, arguments: Arguments, tmp_path: Path
) -> None:
    file, metrics = finished / "allocation.json", _metrics(finished)
    plan = dry_run(load_recipe(arguments(tmp_path, f"quantization.allocation={file}", "quantization.bits=4")))
    assert "average bits               2.000" in plan
    assert f"effective bits per weight  {metrics['bits_per_weight']:.3f}" in plan
    with pytest.raises(InputError, match=r"is for group_size 16, not 64"):
        dry_run(load_recipe(arguments(tmp_path, f"quantization.allocation={file}", "quantization.group_size=64")))


def test_the_checkpoint_is_as_readable_as_the_other_files(finished: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in (finished / "packed").iterdir()}
    assert len(set(modes.values())) == 1, modes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("quantization.group_size=64",), r"is for group_size 16, not 64; set quantization\.group_size=16"),
        (("model",), r"quantization\.allocation: model\.layers\.\d.* groups there"),
    ],
)
def test_an_allocation_that_does_not_fit(
    finished: Path,
    arguments: Arguments,
    make_model: ModelMaker,
    tmp_path: Path,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    model = make_model("llama", blocks=3) if overrides == ("model",) else None
    keys = [key for key in overrides if "=" in key]
    with pytest.raises(InputError, match=message):
        run(arguments(tmp_path, f"quantization.allocation={finished / 'allocation.json'}", *keys, model=model))


def test_a_published_allocation_is_that_of_our_own_file(finished: Path, arguments: Arguments, tmp_path: Path) -> None:
    own = json.loads((finished / "allocation.json").read_text())["bits"]
    published: dict[int, dict[str, list[int]]] = defaultdict(dict)
    for name, widths in own.items():
        _, _, index, layer = name.split(".", 3)
        published[int(index)][layer] = widths
    file = tmp_path / "Llama.pt"
    torch.save(dict(published), file)
    for name, allocation in {"own": finished / "allocation.json", "published": file}.items():
        run(arguments(tmp_path / name, "quantization.method=slimllm", f"quantization.allocation={allocation}"))
    first, second = (tmp_path / name / "packed/model.safetensors" for name in ("own", "published"))
    assert first.read_bytes() == second.read_bytes()
    torch.save({index: {name: widths[1:] for name, widths in published[index].items()} for index in published}, file)
    with pytest.raises(InputError, match=r"q_proj has 3 groups there and 4 in the model"):
        run(arguments(tmp_path / "other", f"quantization.allocation={file}"))


@pytest.mark.parametrize("method", ["rtn", "gptq", "slimllm"])
def test_methods_without_training(arguments: Arguments, tmp_path: Path, method: str) -> None:
    run(arguments(tmp_path / method, f"quantization.method={method}", "quantization.bits=3"))
    metrics = _metrics(tmp_path / method)
    assert metrics["average_bits"] == 3.0
    widths = {
        width
        for group in json.loads((tmp_path / method / "allocation.json").read_text())["bits"].values()
        for width in group
    }
    assert widths == ({2, 3, 4} if method == "slimllm" else {3})


@pytest.mark.parametrize("model_type", sorted(set(BLOCKS) - {"llama"}))
def test_every_architecture_loads_back(
    arguments: Arguments, make_model: ModelMaker, tmp_path: Path, model_type: str
) -> None:
    run(arguments(tmp_path / "run", "quantization.method=gptq", "quantization.bits=8", model=make_model(model_type)))
    perplexity = _metrics(tmp_path / "run")["perplexity"]
    assert perplexity["quantized"] == pytest.approx(perplexity["full"], rel=0.05)


def test_a_whole_run_in_bfloat16(arguments: Arguments, make_model: ModelMaker, tmp_path: Path) -> None:
    """Biases, layer norms and tied weights included: OPT has them all."""
    run(arguments(tmp_path / "run", "trainer.precision=bf16-mixed", model=make_model("opt")))
    metrics = _metrics(tmp_path / "run")
    assert metrics["precision"] == "bf16-mixed"
    assert metrics["average_bits"] == 2.0
    assert metrics["perplexity"]["quantized"] == pytest.approx(metrics["perplexity"]["full"], rel=0.5)


def test_shards(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimplus.hub import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    run(arguments(tmp_path / "run", "quantization.method=rtn"))
    packed = tmp_path / "run" / "packed"
    shards = sorted(file.name for file in packed.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    assert len(_packed_layers(slimplus.load(packed))) == 14


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.samples=100000", r"fewer than data\.samples=100000"),
        ("training.batch_size=3", r"8 windows are no whole number of steps of 3 .* give a multiple of 3"),
        ("training.accumulate_grad_batches=2", r"training\.batch_size: 1 windows a step cannot be shared evenly"),
        ("data.evaluation.sequence_length=200000", "200000 tokens are more than the model takes; give at most 256"),
        ("model.path=nobody/no-such-model", "cannot load 'nobody/no-such-model'"),
    ],
)
def test_bad_input_found_late_is_still_one_sentence(
    arguments: Arguments, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(arguments(tmp_path, override))


# Real processes


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _train(arguments: list[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_command(arguments: Arguments, tmp_path: Path) -> None:
    done = _train(arguments(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "average bits" in done.stdout
    assert "It writes:" in done.stdout
    assert "quantizing: block 2 of 2" in done.stderr
    for chatter in ("GPU available", "does not have many workers", "max_epochs"):
        assert done.stderr.count(chatter) <= 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(
    arguments: Arguments, make_model: ModelMaker, tmp_path: Path
) -> None:
    """Beyond the model in its stored dtype, once in memory and once as pages of its file that the kernel keeps mapped.

    One float32 copy of each block that is not freed would add as much again.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1408}
    stored_block = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1408)
    peaks = {}
    for blocks in (2, 8):
        folder = tmp_path / str(blocks)
        model = make_model("llama", blocks=blocks, **sizes)
        done = _train(
            arguments(folder, "data.samples=2", "quantization.group_size=128", "training.epochs=1", model=model)
        )
        assert done.returncode == 0, done.stderr
        peaks[blocks] = int(_metrics(folder)["peak_memory_bytes"])
    assert peaks[8] - peaks[2] < 6 * stored_block * 3, peaks
