"""What is asked of ``trace-dist memory``; apart from the arithmetic, so that parsing arguments imports no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trace_dist.config import Backend, Dtype, Quantize, StateDtype
from trace_dist.config.granularity import Granularities


@dataclass(frozen=True)
class MemorySetup:
    """A masked training whose memory is asked for."""

    model: str
    """A config.json, a folder that holds one, or a hub id; weights are neither needed nor read."""
    density: float = 0.05
    """Share of the maskable elements that are trained, in (0, 1]."""
    granularity: str = "element"
    """What is selected together: element, block, row, column, head or tensor; of some roles another one, as in `row,q=head`."""
    block: int = 32
    """Contiguous elements of one row per unit, for granularity block."""
    maskable: str = "linear"
    """`linear` (every linear layer but the output head), `all`, or a regular expression over parameter names."""
    dtype: Dtype = "bfloat16"
    """Data type of the weights."""
    quantize: Quantize = "none"
    """`nf4`: linear layers are frozen 4-bit codes, and masked entries live beside them."""
    state_dtype: StateDtype = "float32"
    """Of both moments."""
    master: bool = True
    """Keep an fp32 copy of the masked entries of half-precision weights."""
    offload: Literal["none", "cpu"] = "none"
    """Where moments and master live."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the ranks compute on; on a CPU offloaded states lie in the same memory."""
    backend: Backend = "zero3"
    """How the model is spread over the ranks."""
    world_size: int = 1
    """Number of ranks."""
    micro_batch_size: int = 1
    """Examples per forward and backward pass on one rank."""
    sequence_length: int = 512
    """Tokens per example."""
    sequence_parallel: int = 1
    """Ranks that share the rows of a micro-batch (`train.sequence_parallel`); each holds a slice of activations and logits. What
    their exchange of attention heads takes meanwhile is not counted."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    keep_best: bool = False
    """Whether training looks at validation examples and keeps a copy of the best values, in host memory (`train.keep`)."""
    checkpoint_async: bool = True
    """Whether checkpoints are written while training goes on, from a copy in host memory (`train.checkpoint_async`); false also
    where none are kept."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: must lie in (0, 1]; use for example 0.05")
        Granularities.parse(self.granularity, "granularity")
        for name, least in (
            *(("block", 1), ("world_size", 1), ("micro_batch_size", 1), ("sequence_length", 2)),
            ("sequence_parallel", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}; raise it")
        if self.backend == "single" and self.world_size > 1:
            raise ValueError(
                f"backend='single': {self.world_size} ranks; use backend zero3 or fsdp2, or world_size 1"
            )
