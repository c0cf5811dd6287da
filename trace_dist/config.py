"""The configuration of a run: frozen dataclasses, read from YAML by jsonargparse (see ``cli``).

One YAML file describes a whole run; every command reads the same file and uses its sections. The docstring
under a field is its help text. Values are checked when a dataclass is built, so that a wrong value is
one clear error before any work starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from trace_dist.utils.names import check_task_name

Granularity = Literal["element", "block", "row", "column", "head", "tensor"]
Placement = Literal["magnitude", "random", "refine", "narrow"]
Score = Literal["l2", "fisher", "l2_fisher"]
Backend = Literal["single", "zero3", "fsdp2"]
Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["none", "nf4"]
StateDtype = Literal["float32", "bfloat16", "8bit"]


def _check(ok: bool, name: str, value: object, rule: str, cure: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r}: {rule}; {cure}")


def _at_least(least: int, section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(
            value is None or value >= least,
            f"{prefix}.{name}",
            value,
            f"must be at least {least}",
            "raise it",
        )


def _positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _check(
            value is None or 0 < value < float("inf"),
            f"{prefix}.{name}",
            value,
            "must be positive",
            "raise it",
        )


@dataclass(frozen=True)
class TinyConfig:
    """A Llama small enough to be trained on the spot, over characters (no download)."""

    hidden_size: int = 128
    """Width; a multiple of num_heads."""
    num_layers: int = 4
    """Number of decoder layers."""
    num_heads: int = 4
    """Number of attention heads."""
    intermediate_size: int = 384
    """Width of the MLP."""
    steps: int = 600
    """Optimizer steps of pretraining on the general tasks."""
    lr: float = 1.5e-3
    """Peak learning rate of pretraining."""
    batch_size: int = 64
    """Examples per pretraining step."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "batch_size")
        _at_least(1, self, "tiny", *sizes)
        _positive(self, "tiny", "lr")
        _check(self.hidden_size % self.num_heads == 0, "tiny.hidden_size", self.hidden_size,
               f"must be a multiple of num_heads={self.num_heads}", "change one of the two")  # fmt: skip
        _check(
            self.steps >= 0, "tiny.steps", self.steps, "must not be negative", "use 0 for an untrained base"
        )


@dataclass(frozen=True)
class PruneConfig:
    """A proxy made from the target: a depth-pruned copy that keeps evenly spaced layers."""

    keep_layers: int = 8
    """How many decoder layers to keep (the first and the last always stay)."""
    heal_steps: int = 0
    """Optimizer steps of language-model training on the general tasks after pruning, to heal the cut."""
    heal_lr: float = 3e-4
    """Peak learning rate of those steps."""

    def __post_init__(self) -> None:
        _check(
            self.keep_layers >= 1,
            "prune.keep_layers",
            self.keep_layers,
            "must be at least 1",
            "keep more layers",
        )
        _at_least(0, self, "prune", "heal_steps")
        _positive(self, "prune", "heal_lr")


@dataclass(frozen=True)
class ModelConfig:
    """Where a model comes from. At most one of tiny, gguf and prune; without any, `path` must exist or be a hub id."""

    path: str
    """Hugging Face id or folder with safetensors; with tiny, gguf or prune the folder they are written to."""
    dtype: Dtype = "float32"
    """Data type of the weights while training."""
    quantize: Quantize = "none"
    """`nf4`: linear layers keep frozen 4-bit codes and masked entries live beside them (target only)."""
    tiny: TinyConfig | None = None
    """Train a tiny Llama on the spot when the folder does not exist."""
    gguf: str | None = None
    """GGUF file to convert when the folder does not exist, or `package:<module>` for one shipped in a package."""
    prune: PruneConfig | None = None
    """Cut the proxy out of the target when the folder does not exist (proxy only)."""

    def __post_init__(self) -> None:
        made = [name for name in ("tiny", "gguf", "prune") if getattr(self, name) is not None]
        _check(
            len(made) <= 1, "model", made, "at most one of tiny, gguf, prune may be set", "remove the others"
        )


@dataclass(frozen=True)
class TaskConfig:
    """One task: prompt/answer pairs from exactly one source (path or reasoning_gym)."""

    name: str
    """Name used in files and tables."""
    path: str | None = None
    """A .jsonl file, a folder with train/eval/test.json (TRACE layout), or a datasets.save_to_disk folder."""
    reasoning_gym: dict[str, Any] | None = None
    """`{dataset: spell_backward, min_word_len: 5, ...}`: a procedural reasoning-gym dataset and its options."""
    prompt_field: str = "prompt"
    """Column with the prompt."""
    answer_field: str = "answer"
    """Column with the answer."""
    num_train: int = 4000
    """Training examples used (fewer if the source has fewer)."""
    num_test: int = 200
    """Test examples used (fewer if the source has fewer)."""
    metric: Literal["exact_match", "choice", "bits_per_byte"] = "exact_match"
    """Greedy exact match, label log-likelihood over the set of answers, or bits per byte of the answer text."""
    steps: int | None = None
    """Optimizer steps for this task; the train section's value when not set."""

    def __post_init__(self) -> None:
        _check((self.path is None) != (self.reasoning_gym is None), f"tasks.{self.name}",
               {"path": self.path, "reasoning_gym": self.reasoning_gym},
               "exactly one of path and reasoning_gym must be set", "give the task one source")  # fmt: skip
        check_task_name(self.name)
        if self.reasoning_gym is not None:
            _check("dataset" in self.reasoning_gym, f"tasks.{self.name}.reasoning_gym", self.reasoning_gym,
                   "needs the key 'dataset'", "name the reasoning-gym dataset")  # fmt: skip
        _at_least(1, self, f"tasks.{self.name}", "num_train", "num_test", "steps")


@dataclass(frozen=True)
class DataConfig:
    """Tokenisation."""

    max_length: int = 512
    """Longest example in tokens, prompt and answer together; a longer prompt is an error, never cut silently."""
    truncate_prompt: bool = False
    """Cut a too long prompt on the left (the answer is never cut); how many were cut is logged."""
    num_proc: int = 1
    """Processes that tokenise."""

    def __post_init__(self) -> None:
        _at_least(2, self, "data", "max_length")
        _at_least(1, self, "data", "num_proc")


@dataclass(frozen=True)
class MaskConfig:
    """Which entries may be trained."""

    density: float = 0.05
    """Share of the maskable elements that are trained, in (0, 1]."""
    granularity: Granularity = "element"
    """What is selected together: element, block, row (output neuron), column (input neuron), head or tensor."""
    block: int = 32
    """Contiguous elements of one row per unit, for granularity block."""
    maskable: str = "linear"
    """`linear` (every linear layer but the output head, fused experts too), `all`, or a regular expression over names."""

    def __post_init__(self) -> None:
        _check(
            0 < self.density <= 1, "mask.density", self.density, "must lie in (0, 1]", "use for example 0.05"
        )
        _check(self.block >= 1, "mask.block", self.block, "must be at least 1", "use 16 to 128")


@dataclass(frozen=True)
class ProbeConfig:
    """The warm-start fine-tune that exposes a task's core parameters (TRACE, arXiv 2605.31025)."""

    steps: int = 40
    """Optimizer steps of the warm start."""
    lr: float = 1e-3
    """Peak learning rate of the warm start."""
    batch_size: int = 64
    """Examples per step."""
    fisher_batches: int = 5
    """Batches over which the empirical Fisher information is averaged after the warm start."""
    score: Score = "l2_fisher"
    """l2 (|update|), fisher (mean squared gradient), or l2_fisher (|update| * sqrt(Fisher))."""
    specificity_weight: float = 0.0
    """Exponent s >= 0: a tensor's budget is scaled by its specificity (1 - max cosine with other tasks) ** s."""

    def __post_init__(self) -> None:
        _at_least(1, self, "probe", "steps", "batch_size", "fisher_batches")
        _at_least(0, self, "probe", "specificity_weight")
        _positive(self, "probe", "lr")


@dataclass(frozen=True)
class ProjectionConfig:
    """Small-to-large: the proxy's budgets on the target, and how places inside a tensor are chosen."""

    placement: Placement = "narrow"
    """magnitude, random, refine (one sharded Fisher pass on the target) or narrow (pool, masked steps, keep the best)."""
    pool_density: float = 0.10
    """Density of the pool of largest magnitudes that `narrow` starts from."""
    narrow_steps: int = 40
    """Masked steps on the pool."""
    narrow_lr: float = 1e-3
    """Peak learning rate of those steps."""

    def __post_init__(self) -> None:
        _at_least(1, self, "projection", "narrow_steps")
        _positive(self, "projection", "narrow_lr")
        _check(0 < self.pool_density <= 1, "projection.pool_density", self.pool_density, "must lie in (0, 1]",
               "use 2 to 4 times mask.density")  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Masked training of one task."""

    steps: int = 300
    """Optimizer steps per task."""
    lr: float = 3e-3
    """Peak learning rate."""
    batch_size: int = 64
    """Examples per optimizer step over all ranks (global batch)."""
    micro_batch_size: int = 64
    """Examples per forward and backward pass on one rank; smaller values accumulate gradients."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on masked entries only."""
    max_grad_norm: float | None = 1.0
    """Global gradient norm over masked entries above which gradients are scaled down; null for none."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    scheduler: str = "cosine_with_min_lr"
    """Name of a transformers learning-rate schedule."""
    min_lr_ratio: float = 0.1
    """Final learning rate over the peak, for schedules with a minimum."""
    state_dtype: StateDtype = "float32"
    """Data type of AdamW's moments: float32, bfloat16, or 8bit (blockwise codes, 1 byte)."""
    master: bool = True
    """Keep an fp32 copy of masked bf16 weights; without it they are rounded stochastically."""
    offload: Literal["none", "cpu"] = "none"
    """Where moments and master live: none is beside the weights, cpu is host memory, where the update then runs."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; null: by time, 0 keeps none."""
    checkpoint_minutes: float = 3.0
    """Minutes of work between checkpoints by time; more where writing one would take over 5 % of them."""
    log_every: int = 10
    """Steps between log lines and TensorBoard points."""

    def __post_init__(self) -> None:
        _at_least(1, self, "train", "steps", "batch_size", "micro_batch_size", "log_every")
        _at_least(0, self, "train", "warmup_steps", "checkpoint_every")
        _positive(self, "train", "eps", "max_grad_norm", "checkpoint_minutes")
        _check(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "both must lie in [0, 1)",
               "use for example [0.9, 0.98]")  # fmt: skip
        _check(0 <= self.min_lr_ratio <= 1, "train.min_lr_ratio", self.min_lr_ratio, "must lie in [0, 1]",
               "use for example 0.1")  # fmt: skip
        _check(0 < self.lr < float("inf"), "train.lr", self.lr, "must be positive", "use for example 1e-3")
        _check(
            0 <= self.weight_decay < float("inf"),
            "train.weight_decay",
            self.weight_decay,
            "must not be negative",
            "use 0",
        )


@dataclass(frozen=True)
class ContinualConfig:
    """How the stream of tasks is learned."""

    methods: list[str] = field(default_factory=lambda: ["retrieved", "merged", "random", "full", "lora"])
    """retrieved (a delta per task), merged (one set of weights), random (retrieved with random masks), and for comparison
    full (full fine-tuning, task after task) and lora (PEFT LoRA, task after task); or the path of a module of your own."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by method, such as `merged: {replay: 0.1}`; the methods' files explain them."""

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.methods if self.methods.count(name) > 1})
        _check(not twice, "continual.methods", twice, "a method is named twice", "name it once")
        _check(len(self.methods) >= 1, "continual.methods", self.methods, "must name at least one method",
               "add one")  # fmt: skip


@dataclass(frozen=True)
class BankConfig:
    """Deltas and retrieval (PROTEUS, arXiv 2603.13235)."""

    clusters: int = 4
    """Largest number of clusters per task; the number used is chosen by held-out likelihood."""
    num_prompts: int = 400
    """Training prompts per task from which a signature is made."""
    layer: int = -1
    """Hidden layer whose mean over the prompt's tokens represents it (-1 is the last)."""

    def __post_init__(self) -> None:
        _at_least(1, self, "bank", "clusters", "num_prompts")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation."""

    batch_size: int = 100
    """Prompts per generation batch on one rank."""
    max_new_tokens: int | None = None
    """Generation cap; derived from the longest reference answer when not set."""

    def __post_init__(self) -> None:
        _at_least(1, self, "eval", "batch_size", "max_new_tokens")


@dataclass(frozen=True)
class LaunchConfig:
    """How `trace-dist run` starts the distributed stages."""

    launcher: Literal["none", "deepspeed", "torchrun", "accelerate"] = "none"
    """Program that starts the ranks; none runs in this process."""
    num_ranks: int = 1
    """Ranks on this machine."""
    parallel_stages: int = 1
    """Independent single-process stages that may run at the same time."""
    single_process: list[str] = field(default_factory=list)
    """Methods that could use all ranks and yet run in one process each, beside those that always do."""

    def __post_init__(self) -> None:
        _at_least(1, self, "launch", "num_ranks", "parallel_stages")
        _check(self.launcher != "none" or self.num_ranks == 1, "launch.num_ranks", self.num_ranks,
               "needs a launcher", "set launch.launcher to deepspeed, torchrun or accelerate")  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs."""

    run_dir: str
    """Folder that receives config.yaml, metrics.jsonl, results.json, report.html and the files of every stage."""
    target: ModelConfig
    """The large model that is trained."""
    tasks: list[TaskConfig]
    """The tasks, in the order in which they arrive."""
    proxy: ModelConfig | None = None
    """The small model that is probed; the target itself is probed when not set."""
    general: list[TaskConfig] = field(default_factory=list)
    """Held-out abilities of the base model, for the general delta; tiny bases are pretrained on them."""
    backend: Backend = "single"
    """single (one process), zero3 (DeepSpeed ZeRO-3) or fsdp2 (torch fully_shard)."""
    seed: int = 0
    """Seed of everything random."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokenisation."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Probing the proxy."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Masks."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """Projecting masks onto the target."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Masked training."""
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    """How the stream of tasks is learned."""
    bank: BankConfig = field(default_factory=BankConfig)
    """Deltas and retrieval."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How `run` starts distributed stages."""

    def __post_init__(self) -> None:
        _check(len(self.tasks) >= 1, "tasks", self.tasks, "must hold at least one task", "add a task")
        names = [task.name for task in (*self.tasks, *self.general)]
        twice = sorted({name for name in names if names.count(name) > 1})
        _check(not twice, "tasks.name", twice, "names must be unique over tasks and general", "rename one")
        _check(
            self.target.prune is None,
            "target.prune",
            self.target.prune,
            "only a proxy can be pruned",
            "move it",
        )
        if self.proxy is not None:
            _check(self.proxy.quantize == "none", "proxy.quantize", self.proxy.quantize,
                   "probing trains every weight, which 4-bit weights cannot", "leave it out")  # fmt: skip
        _check(self.launch.num_ranks == 1 or self.backend != "single", "launch.num_ranks", self.launch.num_ranks,
               "backend single runs in one process", "set backend: zero3 or fsdp2")  # fmt: skip
        unranked = [task.name for task in self.tasks if task.metric == "bits_per_byte"]
        _check(not unranked, "tasks.metric", unranked, "bits_per_byte is for general sets, accuracies are in percent",
               "use exact_match or choice for tasks")  # fmt: skip
        if self.target.quantize != "none":
            self._check_quantized()
        if self.projection.placement == "narrow" and self.proxy is not None:
            _check(self.projection.pool_density >= self.mask.density, "projection.pool_density",
                   self.projection.pool_density, f"must be at least mask.density={self.mask.density}",
                   "raise the pool or choose another placement")  # fmt: skip

    def _check_quantized(self) -> None:
        name, value = "target.quantize", self.target.quantize
        _check(find_spec("bitsandbytes") is not None, name, value, "needs bitsandbytes",
               "install it (pip install 'trace-dist[nf4]') or set none")  # fmt: skip
        _check(self.proxy is not None, name, value, "probing trains every weight, which 4-bit weights cannot",
               "name a proxy")  # fmt: skip

    @property
    def probed(self) -> ModelConfig:
        """The model that is probed: the proxy, or the target where no proxy is named."""
        return self.proxy or self.target
