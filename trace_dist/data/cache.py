"""Where results are kept that the same inputs give again: beside the cache of ``datasets``, named by a digest of the inputs."""

from __future__ import annotations

from pathlib import Path

import datasets


def cached(digest: str, suffix: str) -> Path:
    """The file of a digest; its folder is there.

    Args:
        digest: hexadecimal, of all that the result depends on.
        suffix: of the file, with its dot.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "trace_dist"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest}{suffix}"
