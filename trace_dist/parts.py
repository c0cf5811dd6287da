"""Rows of the drop-in parts ([Note: drop-in parts] in utils/registry.py) that a configuration or a command names.

The rows lie below the configuration, which checks names against them and imports no part.
"""

from __future__ import annotations

from trace_dist.utils.registry import Registry


def _rows(field: str, package: str, *names: str) -> Registry:
    return Registry(field, {name: f"trace_dist.{package}.{name.replace('-', '_')}" for name in names})


METHODS = _rows(
    "continual.methods", "continual.methods",
    "retrieved", "consolidated", "merged", "random", "full", "lora", "sum", "average", "ties", "dare",
    "lora_retrieved", "ewc", "ella", "ps", "osft", "olora", "slao", "shira_random", "joint", "separate", "trace",
    "nearest_mean", "random_features",
)  # fmt: skip
SCORES = _rows(
    "probe.score", "probe.importance",
    "l2", "fisher", "l2_fisher", "first_order", "relative_update", "snr", "l2_plus_fisher", "specific",
)  # fmt: skip
PLACEMENTS = _rows(
    "projection.placement", "projection.placements", "magnitude", "random", "refine", "narrow", "target", "narrow_target",
    "identity", "align",
)  # fmt: skip
ISOLATIONS = _rows("mask.isolation", "continual.isolation", "shared", "exclusive", "soft")
STARTS = _rows("bank.composition", "continual.starts", "none", "combination")
COMPOSITIONS = _rows("composition", "bank.composition", "sum", "average", "ties", "dare", "magnitude_max")
METRICS = _rows(
    "tasks.metric", "evaluation.metrics",
    "exact_match", "choice", "numeric", "token_f1", "rouge_l", "chrf", "bleu", "edit_similarity", "sari", "bits_per_byte",
    "top1",
)  # fmt: skip
EXPORTERS = _rows("format", "bank.export", "hf", "peft-shira", "vllm-patch")
ARMS = _rows(
    "study.stages.arms", "studies.arms",
    "random", "probed", "l2", "snr", "specific", "narrowed", "fisher", "projected", "projected_magnitude", "budgets", "places",
    "identity", "align", "trace", "probed_like_trace", "probed_evenly", "probed_floored", "lora", "full",
)  # fmt: skip
MODALITIES = _rows("data.modality", "modality", "text", "image")
IMAGES = _rows("tasks.path", "data.images", "digits", "letters", "mnist")
SIGNATURES = _rows("bank.signature", "bank.signatures", "kmeans", "diagonal", "full", "dirichlet", "mean")
