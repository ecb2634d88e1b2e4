"""The commands for using a packed checkpoint, as a user meets them."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelMaker, expected_text
from safetensors.torch import load_file, save_file

import slimplus
from slimplus.cli.main import main
from slimplus.evaluation.speed import table
from slimplus.hub.contents import read_contents

CONSOLE = ["-c", "import sys; from slimplus.cli.main import main; sys.exit(main())"]
ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Functions are"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *CONSOLE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "packed"))


# The command line


def test_help_lists_every_command() -> None:
    process = run("--help")
    assert process.returncode == 0
    for command in ("train", "generate", "inspect", "benchmark"):
        assert re.search(rf"^ +{command}\b", process.stdout, re.MULTILINE), command
    assert run().stdout == process.stdout


@pytest.mark.parametrize("command", ["generate", "inspect", "benchmark"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: slimplus {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantize"], "invalid choice: 'quantize'"),
        (["generate"], "the following arguments are required: path, prompt"),
        (["generate", "x", "y", "--max-new-tokens", "0"], "expected an integer of at least 1, got '0'"),
        (["generate", "x", "y", "--temperature", "nan"], "expected a number of at least 0, got 'nan'"),
        (["benchmark", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_arguments_are_one_line(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors at all")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.group_bits"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shuffle_groups(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.group_index"].fill_(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_counts(folder: Path) -> None:
    edit_config(folder, lambda c: c["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].update({"2": 9}))


def leave_the_head_alone(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    kept = {key.replace(name, "lm_head"): tensor for key, tensor in tensors.items() if key.startswith(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    def change(config: dict[str, Any]) -> None:
        quantization = config["quantization_config"]
        quantization |= {key: {"lm_head": quantization[key][name]} for key in ("modules", "shapes")}

    edit_config(folder, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, r"model\.safetensors is damaged \(.*\); export or download the checkpoint again"),
    "header": (spoil_header, r"model\.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
    "nested config": (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json cannot be read"),
    "head alone": (leave_the_head_alone, "do not fit together .*no packed layer lies in a transformer block"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    "index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        r"index\.json cannot be read",
    ),
    "unpacked": (lambda folder: edit_config(folder, lambda c: c.pop("quantization_config")), "not a packed slimplus"),
    "another method": (
        lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(quant_method="gptq")),
        "not a packed slimplus",
    ),
    "no group size": (
        lambda folder: edit_config(folder, lambda c: c["quantization_config"].update(group_size=0)),
        "do not fit together .*group_size is 0",
    ),
    "counts": (change_counts, r"do not fit together .*model\.layers\.0\.mlp\.up_proj has groups"),
    "tensor": (drop_tensor, r"do not fit together .*model\.layers\.0\.mlp\.up_proj\.group_bits"),
    "order": (shuffle_groups, r"do not fit together .*group_index does not order the groups"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_sentence(damage: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, sentence = DAMAGE[damage]
    harm(copy)
    for command in (["inspect", str(copy)], ["generate", str(copy), PROMPT], ["benchmark", str(copy)]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert re.search(sentence, said.err), said.err
        assert len(said.err.splitlines()) == 1
        assert said.out == ""


def test_a_path_that_leads_nowhere(finished: Path, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = {
        "./nowhere": "./nowhere does not exist; give the folder of a packed checkpoint, or a hub id org/name",
        "org/name": "org/name is no folder here and cannot be had from the hub",
        str(finished / "metrics.json"): "is a file; give the folder of a packed checkpoint",
        str(finished): f"give {finished / 'packed'}",
        str(make_model("llama")): "is not a packed slimplus checkpoint; load it with transformers",
    }
    for path, sentence in sentences.items():
        assert main(["inspect", path]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert len(said.splitlines()) == 1


def test_a_dense_model_on_the_hub_is_not_downloaded_to_be_refused(
    monkeypatch: pytest.MonkeyPatch, make_model: ModelMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, name: str(make_model("llama") / name))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloads all of it"))
    assert main(["inspect", "org/dense-70b"]) == 2
    assert "is not a packed slimplus checkpoint; load it with transformers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "sentence"),
    [(errno.ENOSPC, "no space is left to download it"), (errno.EACCES, "cannot be had from the hub")],
)
def test_a_disk_that_is_full_is_not_a_wrong_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, sentence: str
) -> None:
    def fail(*_: Any) -> str:
        raise OSError(code, "as the system says")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    assert main(["inspect", "org/name"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", [1, "../../etc/passwd", "weights.bin", ".safetensors"])
def test_an_index_names_safetensors_files_beside_it(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: Any
) -> None:
    copy = shutil.copytree(packed, tmp_path / "packed")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert main(["inspect", str(copy)]) == 2
    assert f"names {name!r}, which is no safetensors file" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(packed, tmp_path / "packed", ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["generate", str(copy), "x"]) == 2
    assert "has no tokenizer that can be read" in capsys.readouterr().err
    whole = (packed / "tokenizer.json").read_bytes()
    shutil.copy(packed / "tokenizer_config.json", copy)
    (copy / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    assert main(["generate", str(copy), "x"]) == 2
    assert "tokenizer.json is damaged" in capsys.readouterr().err
    (copy / "tokenizer_config.json").write_text("{")
    assert main(["generate", str(copy), "x", "--chat"]) == 2
    assert "tokenizer_config.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "PATH", ""], "the prompt is empty"),
        (["generate", "PATH", "x", "--top-p", "1.5"], "--top-p: expected a number above 0 and at most 1, got 1.5"),
        (["generate", "PATH", "x", "--chat"], "has no chat template; leave --chat out"),
        (["generate", "PATH", "x", "--device", "gpu"], "--device: gpu cannot be used"),
        (["benchmark", "PATH", "--new-tokens", "1"], "--new-tokens: give at least 2"),
        (["benchmark", "PATH", "--gguf-file", "x.gguf"], "--gguf-file: names a file of --dense MODEL"),
        (["benchmark", "PATH", "--prompt-tokens", "250"], "314 tokens are more than the 256 that the model takes"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--json", "/"], "--json: / is a folder; give a file"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--dense", "./nowhere"], "--dense: ./nowhere does not exist"),
        (["benchmark", "PATH", "--prompt-tokens", "9", "--dense", "PATH", "--gguf-file", "x"], "--gguf-file: x is not"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], sentence: str, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.replace("PATH", str(packed)) for argument in words]) == 2
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""


def test_nothing_heavy_is_imported_before_every_check_has_passed(packed: Path) -> None:
    heavy = {"torch", "transformers", "lightning", "datasets", "triton"}
    commands = [
        ["inspect", str(packed)],
        ["generate", str(packed), "x", "--chat"],
        ["benchmark", str(packed), "--dense", "./nowhere", "--prompt-tokens", "9"],
    ]
    code = (
        f"import sys; from slimplus.cli.main import main; statuses = [main(command) for command in {commands!r}]; "
        f"sys.stdout.write(str([*statuses, *sorted({heavy!r} & set(sys.modules))]))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[0, 2, 2]"


# inspect


def test_inspect_gives_the_figures_of_the_run(finished: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    metrics = json.loads((finished / "metrics.json").read_text())
    for figure in ("average_bits", "bits_per_weight", "outer_bytes", "size_bytes", "full_size_bytes", "compression"):
        assert seen[figure] == metrics[figure], figure
    allocation = json.loads((finished / "allocation.json").read_text())["bits"]
    layers = {layer["name"]: layer for layer in seen["layers"]}
    assert layers.keys() - allocation.keys() == metrics["outer_bits"].keys()
    for name, widths in allocation.items():
        assert layers[name]["groups"] == {str(width): widths.count(width) for width in sorted(set(widths))}
    assert layers["model.layers.1.mlp.down_proj"]["shape"] == [64, 160]
    assert sum(layer["bytes"] for layer in seen["layers"]) == seen["block_bytes"] + seen["outer_bytes"]
    assert all(list(layer.widths) == allocation[layer.name] for layer in read_contents(str(packed)).block_layers)


def test_inspect_reads_as_a_table(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"average bits +2\.000", line) for line in lines)
    assert any(
        re.fullmatch(r"size +71\.4 kB, 2\.88 times smaller than at 16 bit \(205\.6 kB\)", line) for line in lines
    )
    assert sum(line.startswith("model.layers.") for line in lines) == 14
    assert any(
        re.fullmatch(r"model\.layers\.0\.mlp\.down_proj +64 × 160( +\d+){3} +3\.523 +4\.5 kB", line) for line in lines
    )


def test_blocks_are_listed_by_number(copy: Path) -> None:
    """transformers sorts the keys of a config as text, and puts block 10 before block 9."""
    tensors = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("layers.1.", "layers.10.").replace("layers.0.", "layers.9."): t for name, t in tensors.items()
    }
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text.replace("layers.1.", "layers.10.").replace("layers.0.", "layers.9."))
    names = [layer.name for layer in read_contents(str(copy)).layers]
    assert names[0].startswith("model.layers.9.")
    assert names[-1].startswith("model.layers.10.")


def test_shards_are_read_through_their_index(packed: Path, model: Any, tmp_path: Path) -> None:
    slimplus.load(packed).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, parts = read_contents(str(packed)), read_contents(str(tmp_path))
    assert parts.layers == whole.layers
    assert parts.size_bytes == whole.size_bytes


# generate


class Recorder:
    """Stands in for the standard output, and keeps every write apart."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> None:
        self.writes.append(text)

    def flush(self) -> None:
        pass


def test_generate_streams_what_the_model_says(copy: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (space,) = tokenizer(" ")["input_ids"]
    settings = copy / "generation_config.json"  # the text comes word by word: let there be words
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sequence_bias": [[[space], 10.0]]}))
    recorder = Recorder()
    monkeypatch.setattr(sys, "stdout", recorder)
    options = ["--max-new-tokens", "80", "--temperature", "1.5", "--top-p", "0.9", "--seed", "7", "--dtype", "float32"]
    assert main(["generate", str(copy), PROMPT, *options]) == 0
    monkeypatch.undo()
    model = slimplus.load(copy, dtype=torch.float32)
    torch.manual_seed(7)
    sampling = {"max_new_tokens": 80, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0}
    assert "".join(recorder.writes) == expected_text(model, tokenizer, PROMPT, **sampling) + "\n"
    assert sum(map(bool, recorder.writes)) > 10, "the text must not come all at once"


@pytest.mark.slow
def test_generate_in_a_process_of_its_own(packed: Path, model: Any, tokenizer: Any) -> None:
    process = run("generate", str(packed), PROMPT, "--max-new-tokens", "12", "--dtype", "float32")
    assert process.returncode == 0, process.stderr
    greedy = expected_text(model, tokenizer, PROMPT, max_new_tokens=12, do_sample=False)
    assert process.stdout == f"{greedy}\n"


def test_chat_uses_the_template(copy: Path, model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    assert main(["generate", str(copy), "Hi", "--chat", "--max-new-tokens", "8", "--dtype", "float32"]) == 0
    expected = expected_text(model, tokenizer, "<user>Hi<me>", max_new_tokens=8, do_sample=False)
    assert capsys.readouterr().out == f"{expected}\n"


# benchmark


@pytest.mark.slow
def test_benchmark_measures_both_side_by_side(packed: Path, make_model: ModelMaker, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    sizes = ["--prompt-tokens", "16", "--new-tokens", "4", "--rounds", "3"]
    process = run("benchmark", str(packed), "--dense", str(make_model("llama")), *sizes, "--json", str(file))
    assert process.returncode == 0, process.stderr
    result = json.loads(file.read_text())
    contents = read_contents(str(packed))
    assert result["machine"]["torch"] == torch.__version__
    assert result["workload"]["prompt_tokens"] == 16
    for name, model in result["models"].items():
        assert len(model["rounds"]) == 3
        decode = sorted(each["decode_seconds"] for each in model["rounds"])[1]
        assert model["decode_tokens_per_second"] == pytest.approx(3 / decode)
        assert model["peak_resident_bytes"] >= model["resident_bytes"] > 1e8, name
        assert model["load_seconds"] > 0
    packed_model, dense = result["models"]["packed"], result["models"]["dense"]
    assert packed_model["weight_bytes"] >= contents.size_bytes
    assert dense["weight_bytes"] >= contents.full_size_bytes
    for figure, ratio in result["packed_over_dense"].items():
        assert ratio == pytest.approx(packed_model[figure] / dense[figure])
    assert re.search(r"^decode, tokens/s +[\d.]+ +[\d.]+ +[\d.]+$", process.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_benchmark(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    process = run("benchmark", str(packed), "--dense", str(tmp_path), "--prompt-tokens", "8", "--new-tokens", "4")
    assert process.returncode == 2
    assert "cannot load" in process.stderr.splitlines()[-1]
    assert process.stdout == ""


def test_one_model_alone_has_no_ratios() -> None:
    figures = {"prefill_tokens_per_second": 10.0, "decode_tokens_per_second": 2.5, "weight_bytes": 3_000_000_000}
    others = {"resident_bytes": 4_000_000, "peak_resident_bytes": 5_000_000, "load_seconds": 1.234}
    model = {"device": "cpu", "peak_device_bytes": None, **figures, **others}
    workload = {"dtype": "bfloat16", "prompt_tokens": 8, "new_tokens": 4, "rounds": 5}
    lines = table({"models": {"packed": model}, "workload": workload}).splitlines()
    assert lines[0] == "cpu, bfloat16, a prompt of 8 tokens, 4 new; median of 5"
    assert any(line.split() == ["weights", "in", "memory", "3.00", "GB"] for line in lines)
    assert not any("device memory" in line or "dense" in line for line in lines)
