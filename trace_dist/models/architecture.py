"""A model's architecture: its config, and the module that the config describes, without storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from trace_dist.models.trust import is_trusted

_FACTORIES = {"ForImageClassification": AutoModelForImageClassification}
"""End of an architecture's name -> what makes its models; all others are causal LMs."""
MOST_LAYERS = 2000
"""Of a model: a damaged config can say any number, and each becomes modules before a weight is looked for."""


def read_config(source: str | Path, what: str) -> Any:
    """The transformers config in a folder or a config.json, or of a hub model.

    Args:
        source: where it lies.
        what: begins the message, such as ``model.path='x'``.

    Raises:
        ValueError: there is none, or it is not valid.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=is_trusted(source))
        for part in (config, config.get_text_config()):
            layers = getattr(part, "num_hidden_layers", None)
            if isinstance(layers, int) and layers > MOST_LAYERS:
                raise ValueError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}")
        return config
    # Hundreds of families check their configs, each in its own way.
    except Exception as error:
        raise ValueError(f"{what}: no readable config ({cause(error)}); restore its config.json") from error


def vocabulary_size(config: Any) -> int | None:
    """Token ids that a model has an embedding for; None where its config states no number."""
    return getattr(config.get_text_config(), "vocab_size", None)


def stated(config: Any, name: str) -> Any:
    """What a config states of a model as a whole; None where it does not.

    Where layers differ in it, as Gemma 4's in ``head_dim``, transformers refuses to be asked, and what is written there counts.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return vars(config).get(config.attribute_map.get(name, name))


def factory_of(config: Any) -> Any:
    """transformers' class that makes the model of a config: a causal LM, or what else its architecture says."""
    names = getattr(config, "architectures", None) or [""]
    return next((made for end, made in _FACTORIES.items() if names[0].endswith(end)), AutoModelForCausalLM)


def empty_model(config: Any, dtype: torch.dtype, what: str) -> Any:
    """The model of a config, on the meta device.

    Args:
        config: from ``read_config``.
        dtype: of its parameters.
        what: begins the message, such as ``model.path='x'``.

    Raises:
        ValueError: the family has no causal LM, or the config lacks what the family needs.
    """
    try:
        with torch.device("meta"):
            return factory_of(config).from_config(
                config, dtype=dtype, trust_remote_code=is_trusted(config.name_or_path)
            )
    # As above, of modules.
    except Exception as error:
        raise ValueError(
            f"{what}: no causal LM of the family {config.model_type!r} can be built from its config ({cause(error)}); "
            "complete the config, or choose another model"
        ) from error


def cause(error: BaseException) -> str:
    """What another library says went wrong, in one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it brings Python code of its own, which runs only with trust_remote_code: true, for authors whom you trust"
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
