"""What is asked of ``trace-dist simulate``; apart from the work, so that parsing arguments imports no model."""

from __future__ import annotations

from dataclasses import dataclass

from trace_dist.config.checks import check_ranks

METHODS = ("element", "block 64", "row", "full", "LoRA")
"""Masks of single elements, of blocks and of rows; full fine-tuning; PEFT's LoRA of as many trained parameters as the masks."""
PEERS = ("full, FSDP2",)
"""Beside them: full fine-tuning under torch's FSDP2."""
MOST_RANKS = 4096
RESERVE_GIB = 1.0
"""Of a GPU's memory, where nothing else is said."""


@dataclass(frozen=True)
class SimulationSetup:
    """A training on a cluster that need not be there."""

    model: str
    """A config.json, a folder that holds one, or a hub id; weights are neither needed nor read."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each, one rank per GPU."""
    gpu: str = "h100"
    """a100, h100, l40s, 4090, mi300x, or a YAML file of an own GPU."""
    link_gbps: float = 400.0
    """Network of each GPU, in 1e9 bits per second, one way."""
    methods: tuple[str, ...] = (*METHODS, *PEERS)
    """What to simulate, of: element, block 64, row, full, LoRA, SHiRA, `full, tuned`, `LoRA, tuned`, `row, FSDP2`,
    `full, FSDP2`, and masks with states in host memory: `row, offload`."""
    density: float = 0.05
    """Share of the linear layers' weights that masks train, in (0, 1]; LoRA gets the rank that trains as many."""
    micro_batch_size: int = 1
    """Examples per rank and step."""
    sequence_length: int = 2048
    """Tokens per example."""
    sequence_parallel: int = 1
    """Ranks that share the rows of a micro-batch (`train.sequence_parallel`), of all methods alike; examples per rank and step
    are then those of so many ranks together."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    blocks: int = 0
    """Decoder blocks of each kind that are simulated, of which one is repeated as often as the model has more; 0: as many as
    ZeRO-3 looks ahead, or all."""
    reserve_gib: float = RESERVE_GIB
    """GiB of a GPU's memory to leave free for the CUDA context, communication and fragmentation, as of `memory plan`."""
    price: float | None = None
    """Dollars per GPU and hour, to say how many tokens one dollar buys."""

    def __post_init__(self) -> None:
        for name, least in (
            *(("nodes", 1), ("gpus_per_node", 1), ("micro_batch_size", 1), ("sequence_length", 2)),
            *(("sequence_parallel", 1), ("blocks", 0)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}; raise it")
        if self.world_size > MOST_RANKS:
            raise ValueError(
                f"nodes={self.nodes}, gpus_per_node={self.gpus_per_node}: more than {MOST_RANKS} ranks; use fewer"
            )
        check_ranks(self.world_size, self.sequence_parallel)
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: must lie in (0, 1]; use for example 0.05")
        if not 0 <= self.reserve_gib < float("inf"):
            raise ValueError(
                f"reserve_gib={self.reserve_gib}: must not be negative; use for example {RESERVE_GIB:g}"
            )
        for name in ("link_gbps", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: must be a positive number; give one")

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus_per_node
