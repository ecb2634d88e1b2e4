"""The auto class of transformers that builds a model: one for language models, one for those that read images too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WHOLE


def auto_class(config: Mapping[str, Any]) -> Any:
    """Return the auto class that builds the whole model, a tower for images included.

    Some architectures have a class of the language model alone besides, which drops the other towers. `architectures`
    of the configuration says which of the two the weights belong to; without it, it is the whole model.

    Args:
        config: values of config.json.
    """
    kind, classes = str(config.get("model_type")), config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    whole, text = WHOLE.get(kind), TEXT.get(kind)
    if whole is None or (text is not None and first == text != whole):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText
