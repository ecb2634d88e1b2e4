"""Tokenizers in GGUF files split as the saved ones do, SentencePiece's by SentencePiece itself."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from slimplus.hub.gguf_tokenizer import PREPENDED, SPACES, add_tokenizer
from slimplus.utils.errors import InputError

SIZE = 420
ROWS = SIZE + 3  # of the embedding
TEXTS = (
    "  two spaces,  and\ttabs\n\nand lines ",
    "A function is a block of code.",
    "naïve café — 東京 2024 🙂",
    "unseen: Ωmega ∑ \x00",
    "control: </s> <0x41>",
)
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
ONE_MORE = "but for one more space before a text that begins with one, or follows a special token"
GEMMA = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@pytest.fixture(scope="module")
def trained(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json of a SentencePiece model, with the kinds of tokens of LLaMA's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    settings: Any = {"model_type": "bpe", "vocab_size": SIZE, "byte_fallback": True, "minloglevel": 2}
    settings |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    lines, model = text_file.read_text().splitlines(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def changed(trained: Path, folder: Path, **values: Any) -> PreTrainedTokenizerFast:
    """The tokenizer with other values at the top of its tokenizer.json, saved in `folder`."""
    content = json.loads((trained / "tokenizer.json").read_text())
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content | values))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write(folder: Path, rows: int = ROWS, exact: str = "yes") -> Path:
    """The tokenizer in `folder` as a GGUF file."""
    file = folder / "tokenizer.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    assert add_tokenizer(writer, folder, rows) == ("llama", exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def field(file: Path, name: str) -> Any:
    return gguf.GGUFReader(file).fields[f"tokenizer.ggml.{name}"].contents()


def as_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model that a GGUF file holds; its types of tokens have the numbers of GGUF's."""
    library: Any = sentencepiece_model_pb2
    proto = library.ModelProto()
    for token, score, kind in zip(*(field(file, name) for name in ("tokens", "scores", "token_type")), strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = library.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = field(file, "add_space_prefix")
    proto.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@pytest.mark.parametrize(
    ("steps", "pre_tokenizer", "prefix"),
    [([PREPENDED, SPACES], None, True), ([], METASPACE, True), ([SPACES], None, False), ([SPACES], GEMMA, False)],
    ids=["llama", "metaspace", "no prefix", "gemma"],
)
def test_sentencepiece_splits_by_the_scores_of_the_file(
    trained: Path, tmp_path: Path, steps: list[Any], pre_tokenizer: Any, prefix: bool
) -> None:
    normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
    saved = changed(trained, tmp_path / "llama", normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    file = write(tmp_path / "llama", exact=ONE_MORE if pre_tokenizer == METASPACE else "yes")
    assert field(file, "model") == "llama"
    assert field(file, "add_space_prefix") is prefix
    processor = as_sentencepiece(file)
    # llama.cpp, as SentencePiece, prepends a space to a text that begins with one, and Metaspace does not.
    for text in TEXTS[pre_tokenizer == METASPACE : 4]:
        assert saved(text, add_special_tokens=False)["input_ids"] == processor.encode(text)
    read: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if prefix:  # transformers' reader prepends the space whatever the file says
        assert [read(text)["input_ids"] for text in TEXTS] == [saved(text)["input_ids"] for text in TEXTS]


def test_kinds_of_tokens_and_whether_a_text_begins_with_one(trained: Path, tmp_path: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    named = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": named}
    changed(trained, tmp_path / "with", post_processor=template)
    with_bos = write(tmp_path / "with", exact=ONE_MORE)
    added = [*content["added_tokens"], content["added_tokens"][0] | {"id": SIZE, "content": "<tool>", "special": False}]
    changed(trained, tmp_path / "without", post_processor=None, added_tokens=added)
    without = write(tmp_path / "without", exact=ONE_MORE)
    kinds = gguf.TokenType
    first = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    assert field(without, "token_type")[:259] == first
    assert field(without, "token_type")[259:SIZE] == [kinds.NORMAL] * (SIZE - 259)
    assert field(without, "token_type")[SIZE:] == [kinds.USER_DEFINED, kinds.UNUSED, kinds.UNUSED]
    assert field(without, "tokens")[SIZE:] == ["<tool>", f"[PAD{SIZE + 1}]", f"[PAD{SIZE + 2}]"]
    assert [field(file, "add_bos_token") for file in (with_bos, without)] == [True, False]
    assert [field(without, f"{name}_token_id") for name in ("unknown", "bos", "eos")] == [0, 1, 2]


def test_merges_that_no_scores_give_are_refused(trained: Path, tmp_path: Path) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    model = content["model"]
    several = next(
        token for token in model["vocab"] if [left + right for left, right in model["merges"]].count(token) > 1
    )
    ways = [merge for merge in model["merges"] if "".join(merge) == several]
    others = [merge for merge in model["merges"] if merge not in ways]
    for number, merges in enumerate(([*ways[1:], *others, ways[0]], [*ways[1:], *others])):
        changed(trained, folder := tmp_path / str(number), model=model | {"merges": merges})
        with pytest.raises(InputError, match=f"merges '{several}' otherwise than a SentencePiece model .*--to dense"):
            write(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("normalizer", {"type": "NFKC"}), ("pre_tokenizer", {"type": "Whitespace"}), ("model", "Unigram")],
)
def test_other_tokenizers_are_refused(trained: Path, tmp_path: Path, key: str, value: Any) -> None:
    content = json.loads((trained / "tokenizer.json").read_text())
    value = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]} if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(InputError, match=r"is none of the byte-level BPE or SentencePiece BPE .*--to dense"):
        write(tmp_path)
    with pytest.raises(InputError, match=r"has a token 419, but the embedding has only 100 rows"):
        write(trained, rows=100)
