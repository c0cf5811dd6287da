"""What a result was made with: date, commit, hardware, versions."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "trace-dist",
    "torch",
    "triton",
    "deepspeed",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "bitsandbytes",
)


DOCUMENTS = ("docs", "README.md")
"""What a result is written to, and not made by."""


def commit_of(here: Path) -> str | None:
    """Commit of a checkout, with ``+`` where files differ from it that are not documents; None outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "-uno", "--", ":/", *(f":(top,exclude){path}" for path in DOCUMENTS)
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code_version() -> str:
    """Version of this package and a digest of its sources: what ranks compare."""
    return f"{_versions().get('trace-dist', 'unknown')} {code_digest()}"


def code_digest() -> str:
    """A digest of this package's sources, kernels included."""
    digest = hashlib.sha256()
    kernels = find_spec("trace_kernels")
    for root in (
        Path(__file__).parents[1],
        *map(Path, (kernels and kernels.submodule_search_locations) or ()),
    ):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".cpp"):
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def meta_info() -> dict[str, Any]:
    """Hardware and versions, for the ``meta_info`` of a result file."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory_gib = psutil.virtual_memory().total / 2**30
    return {
        "hardware": ", ".join(gpus) or f"{_cpu_name()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB",
        "platform": platform.platform(),
        "versions": _versions(),
    }


def made_alike(result: Mapping[str, Any]) -> bool:
    """Whether the measurements in a result file were made by this commit, on this hardware and with these versions."""
    commit = result.get("run_info", {}).get("commit")
    return bool(commit == run_info()["commit"] and result.get("meta_info") == meta_info())


def run_info() -> dict[str, Any]:
    """Date (UTC) and commit, for the ``run_info`` of a result file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_of(Path(__file__).parent),
    }
