"""``trace-dist bench memory``: what is predicted against what is measured, on three sizes of model and one and two ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from trace_dist.config import LaunchConfig
from trace_dist.launching import ProcessFailed, launch_command, launch_environment
from trace_dist.report.memory_tables import comparison_table, print_table
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json

SHAPES = {
    "30M": {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1408, "vocab_size": 16000},
    "80M": {"hidden_size": 640, "num_hidden_layers": 10, "intermediate_size": 1728, "vocab_size": 32000},
    "160M": {"hidden_size": 768, "num_hidden_layers": 16, "intermediate_size": 2048, "vocab_size": 32000},
}
"""Llamas of the comparison; eight heads, tied embeddings."""


def compare_memory(rounds: int = 3) -> dict[str, Any]:
    """Predicted beside measured memory of three Llamas on one and two ranks, each a ``memory profile`` of its own.

    Where there are GPUs, every rank has one.

    Args:
        rounds: measurements of each; the one with the median peak counts. Resident sets differ by some percent.

    Raises:
        ProcessFailed: a profile failed; its own error is printed above.
    """
    max_ranks = min(2, torch.cuda.device_count() or 2)
    rows = []
    for name, shape in SHAPES.items():
        for num_ranks in range(1, max_ranks + 1):
            found = [_profile_in_processes(shape, num_ranks) for _ in range(rounds)]
            result = sorted(found, key=lambda each: each["measured"]["peak"])[rounds // 2]
            print_table(comparison_table(result))
            rows.append({"name": name, **result, "setup": {**result["setup"], "model": name}})
    settings = {"rounds": rounds}
    return {"run_info": run_info(), "meta_info": meta_info(), "settings": settings, "rows": rows}


def _profile_in_processes(shape: Mapping[str, int], num_ranks: int) -> dict[str, Any]:
    launch = LaunchConfig(launcher="torchrun" if num_ranks > 1 else "none", num_ranks=num_ranks)
    with TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "result.json"
        fixed = {"model_type": "llama", "num_attention_heads": 8, "tie_word_embeddings": True}
        write_json(config, fixed | dict(shape))
        command = [*launch_command(launch), "memory", "profile", "--model", str(config), "--out", str(out)]
        command += ["--sequence_length", "128"]
        done = subprocess.run(command, env=launch_environment(num_ranks), stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise ProcessFailed(
                f"memory profile: failed with exit code {done.returncode}; its error is above"
            )
        found = read_json(out)
    return {key: found[key] for key in ("setup", "estimate", "measured", "libraries", "errors")}
