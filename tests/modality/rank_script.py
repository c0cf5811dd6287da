"""The stream of images on the ranks of a job: ``rank_script.py FOLDER``; under ZeRO-3, from a run that was probed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from modality.small import make_config

from trace_dist.continual.driver import run_continual
from trace_dist.utils import dist

METHODS = ("retrieved", "nearest_mean")


def main() -> None:
    """One run."""
    dist.init_distributed()
    # deepspeed puts --local_rank before it
    run_continual(replace(make_config(Path(sys.argv[-1]), METHODS, "ranks"), backend="zero3"))
    dist.close()


if __name__ == "__main__":
    main()
