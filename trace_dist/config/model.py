"""Where a model comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from trace_dist.config.checks import Section, check

Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["none", "nf4"]


@dataclass(frozen=True)
class TinyConfig(Section):
    """A Llama small enough to be trained on the spot, over characters (no download)."""

    section: ClassVar[str] = "tiny"

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

    def check(self) -> None:
        self.at_least(1, "hidden_size", "num_layers", "num_heads", "intermediate_size", "batch_size")
        self.positive("lr")
        divides = self.hidden_size % self.num_heads == 0
        rule = f"must be a multiple of num_heads={self.num_heads}"
        check(divides, "tiny.hidden_size", self.hidden_size, rule, "change one of the two")
        cure = "use 0 for an untrained base"
        check(self.steps >= 0, "tiny.steps", self.steps, "must not be negative", cure)


@dataclass(frozen=True)
class VitConfig(Section):
    """A vision transformer small enough to be trained on the spot, on images that are none of the tasks' (no download)."""

    section: ClassVar[str] = "vit"

    image_size: int = 8
    """Height and width in pixels; a multiple of patch_size. Other images are scaled to it."""
    patch_size: int = 4
    """Height and width of the patches that are its tokens."""
    hidden_size: int = 64
    """Width; a multiple of num_heads."""
    num_layers: int = 3
    """Number of layers."""
    num_heads: int = 4
    """Number of attention heads."""
    intermediate_size: int = 128
    """Width of the MLP."""
    pretrain: str = "images:letters"
    """Images of the pretraining, as the `path` of a task."""
    pretext: Literal["classes", "rotations"] = "classes"
    """What is learned of them: their classes, or by how many quarter turns each was turned, which needs no labels."""
    steps: int = 900
    """Optimizer steps of pretraining."""
    lr: float = 1.5e-3
    """Peak learning rate of pretraining."""
    batch_size: int = 64
    """Images per pretraining step."""
    classes: list[str] | None = None
    """Classes that the head has a row for, those of later tasks too; when not set, those of the run's tasks."""

    def check(self) -> None:
        self.at_least(
            1, "patch_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "batch_size"
        )
        self.positive("lr")
        for name, divisor in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
            value, by = getattr(self, name), getattr(self, divisor)
            rule = f"must be a positive multiple of {divisor}={by}"
            check(value > 0 and value % by == 0, f"vit.{name}", value, rule, "change one of the two")
        check(self.steps >= 0, "vit.steps", self.steps, "must not be negative", "use 0 for an untrained base")


@dataclass(frozen=True)
class PruneConfig(Section):
    """A proxy made from the target: a copy of evenly spaced layers, and of each some channels, heads and neurons if asked for."""

    section: ClassVar[str] = "prune"

    keep_layers: int | None = None
    """How many decoder layers to keep (the first and the last always stay); when not set, all of a narrower copy, else 8."""
    keep_hidden: int | None = None
    """Channels of the residual stream to keep; all when not set. What is kept is chosen by the norms of the weights."""
    keep_heads: int | None = None
    """Query heads of each layer to keep, as whole groups that share a key head, or as many of each group; all when not set."""
    keep_intermediate: int | None = None
    """Neurons of each layer's MLP to keep; all when not set."""
    heal_steps: int = 0
    """Optimizer steps of language-model training on the general tasks after pruning, to heal the cut."""
    heal_lr: float = 3e-4
    """Peak learning rate of those steps."""

    def check(self) -> None:
        self.at_least(1, "keep_layers", "keep_hidden", "keep_heads", "keep_intermediate")
        self.at_least(0, "heal_steps")
        self.positive("heal_lr")

    @property
    def is_narrow(self) -> bool:
        """Whether the layers that stay are cut too."""
        return any(each is not None for each in (self.keep_hidden, self.keep_heads, self.keep_intermediate))

    @property
    def layers(self) -> int | None:
        """How many layers to keep; None for all."""
        return 8 if self.keep_layers is None and not self.is_narrow else self.keep_layers


@dataclass(frozen=True)
class ModelConfig(Section):
    """Where a model comes from. At most one of tiny, vit, gguf and prune; without any, `path` must exist or be a hub id."""

    section: ClassVar[str] = "model"

    path: str
    """Hugging Face id or folder with safetensors; with tiny, vit, gguf or prune the folder they are written to."""
    dtype: Dtype = "float32"
    """Data type of the weights while training."""
    quantize: Quantize = "none"
    """`nf4`: linear layers keep frozen 4-bit codes and masked entries live beside them (target only)."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings, if it does; only for models whose authors you trust."""
    tiny: TinyConfig | None = None
    """Train a tiny Llama on the spot when the folder does not exist."""
    vit: VitConfig | None = None
    """Train a tiny vision transformer on the spot when the folder does not exist (`data.modality: image`)."""
    gguf: str | None = None
    """GGUF file to convert when the folder does not exist, or `package:<module>` for one shipped in a package."""
    prune: PruneConfig | None = None
    """Cut the proxy out of the target when the folder does not exist (proxy only)."""

    @property
    def source(self) -> tuple[TinyConfig | None, VitConfig | None, str | None, PruneConfig | None]:
        """What the model is made of where its folder does not exist: at most one of these."""
        return self.tiny, self.vit, self.gguf, self.prune

    @property
    def made(self) -> bool:
        """Whether the model is made on the spot where its folder does not exist."""
        return any(each is not None for each in self.source)

    def check(self) -> None:
        self.expand("path", "gguf")
        sources = [name for name in ("tiny", "gguf", "prune", "vit") if getattr(self, name) is not None]
        rule = "at most one of tiny, gguf, prune, vit may be set"
        check(len(sources) <= 1, "model", sources, rule, "remove the others")
