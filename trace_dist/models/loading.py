"""Loading tokenizers and models: whole in one process, or sharded so that no rank ever holds the whole.

[Note: sharded while loading] Of every parameter, flattened in row-major order, ZeRO-3 keeps the interval
[rank * n, (rank + 1) * n), n = ceil(numel / num_ranks), in ``param.ds_tensor`` (zero-padded at the end); FSDP2 keeps
rows. The module is built without storage, its linear layers become 4-bit where asked for, and it is sharded; then each
rank reads exactly its intervals from the safetensors files. The largest thing it holds beside its share is one
parameter, which is uninitialised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trace_dist.config import Dtype, Quantize
from trace_dist.models.architecture import cause, empty_model, factory_of, read_config, vocabulary_size
from trace_dist.models.filling import Slot, fill, missing_parameters
from trace_dist.models.kinds import check_quantize, torch_dtype
from trace_dist.models.naming import pieces_of
from trace_dist.models.nf4 import quantize_nf4
from trace_dist.models.trust import is_trusted
from trace_dist.models.weight_files import open_weights, resolve


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint folder or hub model; the end-of-text token pads where there is no padding token, or the model
    has no embedding for it.

    Raises:
        ValueError: no such model, or it has no tokenizer.
    """
    folder = resolve(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=is_trusted(folder))
        # some of its settings are looked at only now
        tokenizer("a")
    # Tokenizer files are read by several libraries.
    except Exception as error:
        what = f"model.path={str(path)!r}"
        if factory_of(read_config(folder, what)) is not AutoModelForCausalLM:
            raise ValueError(
                f"{what}: reads no text, it is a classifier of images; set data.modality: image, or name a causal LM"
            ) from error
        raise ValueError(f"{what}: no readable tokenizer ({cause(error)}); save one there") from error
    if tokenizer.pad_token_id is None or not _is_embedded(tokenizer.pad_token_id, folder):
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _is_embedded(token: int, folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return True
    vocab_size = vocabulary_size(read_config(folder, f"model.path={str(folder)!r}"))
    return vocab_size is None or token < vocab_size


def load_model(
    path: str | Path, dtype: Dtype | torch.dtype = "float32", quantize: Quantize = "none"
) -> PreTrainedModel:
    """Load a causal LM, or a classifier of images, on the CPU, in evaluation mode.

    Args:
        path: folder with safetensors weights, or a hub id.
        dtype: data type of the weights.
        quantize: ``nf4`` keeps the linear layers as 4-bit codes (models/nf4.py), made layer by layer.

    Raises:
        ValueError: no such model, pickled or corrupt weights, or a parameter that the checkpoint lacks (which
            would otherwise be random), weights that are quantised already, or an unknown ``dtype`` or ``quantize``.
    """
    dtype = torch_dtype(dtype)
    check_quantize(quantize)
    if quantize == "nf4":
        return _load_in_shards(path, dtype, quantize, _empty_on_cpu, _whole)
    with open_weights(path) as files:  # refuses what must not or cannot be read
        folder = files.folder
    try:
        factory = factory_of(read_config(folder, f"model.path={str(path)!r}"))
        loaded: Any = factory.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=is_trusted(folder),
        )
    # Hundreds of families load their weights, each in its own way.
    except Exception as error:
        raise ValueError(
            f"model.path={str(path)!r}: cannot be loaded ({cause(error)}); check its files"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(missing_parameters(folder, sorted(info["missing_keys"])))
    return model


def load_model_zero3(
    path: str | Path, dtype: Dtype | torch.dtype, ds_config: dict[str, Any], quantize: Quantize = "none"
) -> PreTrainedModel:
    """Load a causal LM sharded by ZeRO-3, in evaluation mode; see [Note: sharded while loading].

    Gives the values, buffers and ties that ``load_model`` gives. Needs a process group; sends no weights.

    Args:
        path: folder with safetensors weights, or a hub id.
        dtype: data type of the weights; overrides the sections ``bf16`` and ``fp16`` of ``ds_config`` here.
        ds_config: DeepSpeed configuration with ``zero_optimization.stage`` 3.
        quantize: ``nf4`` keeps the linear layers as 4-bit codes (models/nf4.py).

    Raises:
        ValueError: as ``load_model``; ZeRO options that keep more copies of the weights.
    """
    check_zero_config(ds_config)
    dtype = torch_dtype(dtype)
    # On a CPU, zero.Init honours the data type of its configuration but not its argument `dtype`.
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": False}}
    return _load_in_shards(
        path, dtype, quantize, lambda model: _partition(model, {**ds_config, **precision}), _zero3_slot
    )


def load_model_fsdp2(
    path: str | Path,
    dtype: Dtype | torch.dtype,
    wrap: Callable[[nn.Module], None],
    device: torch.device,
    first: Callable[[Sequence[int]], int],
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """Load a causal LM sharded by FSDP2, in evaluation mode; see [Note: sharded while loading].

    Args:
        path: folder with safetensors weights, or a hub id.
        dtype: data type of the weights.
        wrap: applies ``fully_shard``; the parameters are on the meta device then.
        device: where the shards live.
        first: shape of a parameter -> where this rank's interval of it begins.
        quantize: ``nf4`` keeps the linear layers as 4-bit codes (models/nf4.py).

    Raises:
        ValueError: as ``load_model``.
    """

    def give_storage(model: nn.Module) -> None:
        wrap(model)
        model.to_empty(device=device)

    def slot(param: Any) -> Slot:
        return Slot(param.to_local().view(-1), first(param.shape), param.numel())

    return _load_in_shards(path, dtype, quantize, give_storage, slot)


def _load_in_shards(
    path: str | Path,
    dtype: Dtype | torch.dtype,
    quantize: Quantize,
    give_storage: Callable[[nn.Module], object],
    slot: Callable[[Any], Slot],
) -> PreTrainedModel:
    dtype = torch_dtype(dtype)
    check_quantize(quantize)
    with open_weights(path) as files:
        folder = files.folder
        what = f"model.path={str(path)!r}"
        model = empty_model(read_config(folder, what), dtype, what)
        pieces = pieces_of(model, files.names())
        if quantize == "nf4":
            quantize_nf4(model)
        give_storage(model)
        fill(model, files, pieces, slot)
    return with_generation(model, folder)


def with_generation(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, in evaluation mode, with the settings of generation that lie beside it.

    Raises:
        ValueError: they make no sense.
    """
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        # It checks what its fields say of each other.
        except Exception as error:
            raise ValueError(
                f"{folder / 'generation_config.json'}: cannot be read ({cause(error)}); mend it, or delete it for the defaults"
            ) from error
    return model.eval()


def _empty_on_cpu(model: Any) -> None:
    model.to_empty(device="cpu")
    # Each name of a tied parameter has been given storage of its own.
    model.tie_weights()


def _whole(param: Any) -> Slot:
    return Slot(param.data.view(-1), 0, param.numel())


def _zero3_slot(param: Any) -> Slot:
    """[rank * n, (rank + 1) * n) of the flattened parameter, zero-padded at the end."""
    shard = param.ds_tensor
    return Slot(shard, param.ds_zero_partition_rank * shard.numel(), param.ds_numel)


def check_zero_config(ds_config: dict[str, Any]) -> None:
    """Raise ValueError unless a DeepSpeed configuration is of ZeRO-3 with one copy of each weight, in memory."""
    zero = ds_config.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ValueError(
            f"zero_optimization.stage={zero.get('stage')!r}: must be 3 to load shards; set it to 3"
        )
    copies = (
        ("zero_hpz_partition_size", (None, 1)),
        ("zero_quantized_weights", (None, False)),
        ("zero_quantized_nontrainable_weights", (None, False)),
    )
    for name, allowed in copies:
        if zero.get(name) not in allowed:
            raise ValueError(
                f"zero_optimization.{name}={zero[name]!r}: keeps a second copy of the weights, or codes in their "
                "place, which masked updates would not reach; remove it"
            )
    device = (zero.get("offload_param") or {}).get("device")
    if device not in (None, "none"):
        raise ValueError(
            f"zero_optimization.offload_param.device={str(device)!r}: shards must lie where the model computes; remove it and "
            "use MaskedAdamW(offload='cpu'), which moves the optimizer states"
        )


def _partition(model: nn.Module, ds_config: dict[str, Any]) -> None:
    """Replace parameters on the meta device by partitioned, uninitialised ones, and give the buffers storage."""
    from deepspeed.runtime.zero import Init

    class QuietInit(Init):
        """``zero.Init`` broadcasts rank 0's values of every parameter; here they are still undefined."""

        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    init, made = QuietInit(config_dict_or_path=ds_config), {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if param not in made:  # ties stay ties
                made[param] = nn.Parameter(
                    torch.empty_like(param, device=init.local_device), requires_grad=param.requires_grad
                )
                init._zero_init_param(made[param])
            setattr(module, name, made[param])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=init.local_device))
