"""Importance specific: what the task needs, and other tasks and the general sets do not.

    own / (1 + mean of the others),   each task's l2_fisher over its mean over the model's units

The others are the run's other tasks and its general sets, which are probed for this. 1 is the importance of an average unit: what
matters little to anybody is not chosen for the others' sake. On the target, where a placement reads a trace of this task
alone, places are those of ``l2_fisher``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

label = "update times gradient, over that of other tasks and the general sets"
uses_update = True
parts = ("l2_fisher",)


def contrast(own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores from a task's own and the mean of the others', both over their means: parameter -> [num_units] fp32."""
    return {name: (values.double() / (1 + others[name].double())).float() for name, values in own.items()}
