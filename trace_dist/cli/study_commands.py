"""The command ``study``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trace_dist.cli.parser import run_config
from trace_dist.stages.start import check_parts
from trace_dist.studies import one_model, small_to_large
from trace_dist.studies.local_tasks import with_local_tasks
from trace_dist.utils import dist

STUDIES: dict[str, Callable[..., dict[str, Any]]] = {
    "small-to-large": small_to_large.run_study,
    "one-model": one_model.run_study,
}


def study_command(values: Any) -> None:
    """Work on a study.

    Raises:
        ValueError: several ranks, or a value makes no sense.
    """
    name, arguments = values.action, values[values.action]
    hours = arguments.hours
    if hours is not None and hours < 0:
        raise ValueError(f"hours={hours}: must not be negative; use 0 to sum up what is known")
    cfg = run_config(arguments)
    if cfg.backend != "single":
        raise ValueError(f"backend={cfg.backend!r}: a study trains in one process; set backend: single")
    dist.init_distributed()
    check_parts(with_local_tasks(cfg, arguments.study.local_tasks))
    some = {"only": arguments.only} if "only" in arguments else {}
    STUDIES[name](cfg, arguments.study, hours, **some)
