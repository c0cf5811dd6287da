"""The seam between what an example is and everything that learns, keeps and finds tasks.

[Note: a modality's file] A file of ``trace_dist.modality`` holds the functions of ``Modality``. The rest of the system sees
examples (a prompt, which is a text or a URI, and an answer), encoded examples (``labels`` and ``num_answer_tokens``, and what
the modality reads), micro-batches and representations. Which class makes the model follows from its config.json
(models/architecture.py), and how a task is scored from its metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import datasets
from torch import Tensor, nn

from trace_dist.config import DataConfig, EvalConfig, MaskConfig
from trace_dist.config.bank import Pooling
from trace_dist.data.tasks import Task
from trace_dist.parts import MODALITIES

TEXT = "text"
"""The modality of a metric that names none."""


class Modality(Protocol):
    """What a modality's file holds."""

    keeps_prompts: bool
    """Whether a bank keeps prompts, which a teacher can be asked again."""
    poolings: tuple[Pooling, ...]
    """Ways of making one representation of a prompt, as ``bank.pooling`` names them."""

    def load_reader(self, path: str | Path) -> Any:
        """What reads its examples for a model: a tokenizer, an image processor. Raises ValueError where there is none."""

    def encode(self, dataset: datasets.Dataset, reader: Any, cfg: DataConfig) -> datasets.Dataset:
        """Examples as they are trained."""

    def batching(self, reader: Any) -> dict[str, Any]:
        """Keyword arguments of ``Batches``: how a micro-batch is made, and its loss."""

    def check_size(
        self,
        task: Task,
        reader: Any,
        role: str,
        context: int | None,
        scored: bool,
        data: DataConfig,
        evaluation: EvalConfig,
    ) -> None:
        """Raise ValueError where a model of the run cannot read or answer an example of a task.

        Args:
            task: the examples.
            reader: the model's; None where the model is not made yet and its reader is not known.
            role: target or proxy.
            context: positions of the model; None without a limit.
            scored: whether it reads test examples as well.
            data: longest example and truncation.
            evaluation: generation cap.
        """

    def represent(
        self,
        model: Any,
        prompts: Sequence[Any],
        reader: Any,
        data: DataConfig,
        *,
        layers: Sequence[int],
        poolings: Sequence[Pooling],
        batch_size: int,
    ) -> dict[Pooling, Tensor]:
        """By pooling, [N, L, D] fp32 representations of prompts by hidden layers of the model as it is. Collective."""

    def always(self, module: nn.Module, task: Task, mask: MaskConfig) -> Mapping[str, Tensor]:
        """Elements that every mask of a task holds, beside those that are selected: parameter -> flat indices, sorted."""

    def lora(self, module: nn.Module) -> dict[str, Any]:
        """Options of PEFT's LoraConfig: what is adapted, and what is trained whole."""


def load_modality(name: str) -> Modality:
    """The modality of a name. Raises ValueError where there is none."""
    return cast(Modality, MODALITIES.load(name))
