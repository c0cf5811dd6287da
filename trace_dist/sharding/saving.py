"""Writing a whole model, gathered by whoever calls, as a Hugging Face checkpoint."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from trace_dist.utils.files import filled_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""The names under which transformers and we look for weights."""


def check_can_be_saved(module: nn.Module) -> None:
    """Raise ValueError for a model with PEFT adapters: saved alone, they would lack what a mask trained beside them."""
    adapters = sorted(
        {type(child).__name__ for child in module.modules() if type(child).__module__.startswith("peft.")}
    )
    if adapters:
        raise ValueError(
            f"model: holds PEFT adapters ({', '.join(adapters[:3])}), which cannot be saved with masked weights; call "
            "merge_and_unload() first, or give the model without them"
        )


def write_pretrained(module: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Write an ordinary Hugging Face checkpoint; of a module that is none of transformers', the weights alone.

    Args:
        module: the model, sharded or not, without wrappers.
        state: its whole weights and persistent buffers; tied names share one tensor.
        folder: made if missing; filled once all is written. The weights of a checkpoint that lay there go: one file and
            shards beside each other would be read in either way.

    Raises:
        ValueError: it cannot be written; what lay in the folder is then still there.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    stale = [path.name for path in there if _WEIGHT_FILE.fullmatch(path.name)]
    with filled_folder(folder, stale) as temporary:
        write_files(module, state, temporary)


def write_files(module: Any, state: dict[str, Tensor], folder: Path) -> None:
    """The files of ``write_pretrained``, one by one into a folder that is there and holds no weights.

    Args:
        module, state: as of ``write_pretrained``.
        folder: the folder.
    """
    # Slow to import, and a command on a bank has no model; who has one has imported it.
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    twin = _twin(module, state) if isinstance(module, PreTrainedModel) else None
    if twin is not None:
        twin.save_pretrained(folder, state_dict=state)
        return
    if isinstance(module, PreTrainedModel):
        config = copy.deepcopy(module.config)
        floating = next((value.dtype for value in state.values() if value.is_floating_point()), None)
        config.dtype = str(floating).removeprefix("torch.")
        config.architectures = [type(module).__name__.removeprefix("FSDP")]
        config.save_pretrained(folder)
        if module.can_generate():
            module.generation_config.save_pretrained(folder)
        # As transformers does: its experts, say, lie apart in the files. A part of a tensor would be taken for a tied one.
        state = {
            name: value if value.nbytes == value.untyped_storage().nbytes() else value.clone()
            for name, value in revert_weight_conversion(module, state).items()
        }
    save_torch_state_dict(state, folder, metadata={"format": "pt"})


def _twin(module: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel | None:
    """The same model on the meta device, in the dtypes of ``state``; None where its config alone does not say how it is built.

    transformers asks each parameter for its shape and dtype; a sharded one has another shape.
    """
    try:
        with torch.device("meta"):
            twin = type(module)(copy.deepcopy(module.config))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    if twin.state_dict().keys() != state.keys():
        return None
    for name, parameter in twin.named_parameters():
        parameter.data = parameter.data.to(state[name].dtype)
    if getattr(module, "generation_config", None) is not None:
        twin.generation_config = module.generation_config
    return twin
