"""GGUF files of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from slimplus.hub.gguf import ARCHITECTURES, BLOCK, Type, _add_metadata, _order
from slimplus.hub.gguf_tokenizer import add_tokenizer


def write_gguf(folder: Path, file: Path, without: str = "") -> Path:
    """Writes the model in a folder as GGUF, its matrices in `Q8_0` where their columns allow it."""
    config = json.loads((folder / "config.json").read_text())
    contents: Any = SimpleNamespace(config=config, folder=folder)
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, architecture)
    _add_metadata(writer, contents)
    add_tokenizer(writer, folder, config["vocab_size"])
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            new = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if new is None or new == without:
                continue
            values = tensor[_order(config, name, len(tensor))].float().numpy()
            if values.ndim == 2 and values.shape[1] % BLOCK == 0:
                writer.add_tensor(new, gguf.quants.quantize(values, Type.Q8_0), raw_dtype=Type.Q8_0)
            else:
                writer.add_tensor(new, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
