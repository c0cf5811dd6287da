"""The end of a run on tiny models: its bank is asked a prompt of each of some tasks."""

from __future__ import annotations

from trace_dist.config import RunConfig
from trace_dist.data.tasks import load_task
from trace_dist.serving.options import Sampling, Source
from trace_dist.serving.prompts import Question
from trace_dist.stages.generate import Answered, answer
from trace_dist.train.target import base_path

NUM_TASKS = 3


def asks(cfg: RunConfig) -> bool:
    """Whether a run ends with questions: it retrieves, and its target is small enough to be loaded once more."""
    return (
        cfg.target.tiny is not None and "retrieved" in cfg.continual.methods and cfg.bank_of().index.is_file()
    )


def ask_bank(cfg: RunConfig) -> Answered:
    """The shortest test prompt of each of the first tasks, answered from the run's bank."""
    tasks = [load_task(task, cfg.seed) for task in cfg.tasks[:NUM_TASKS]]
    asked = [Question(min(task.test["prompt"][:], key=len), None) for task in tasks]
    source = Source(
        str(cfg.bank_of().root), str(base_path(cfg.target)), cfg.target.dtype, cfg.target.quantize
    )
    return answer(source, Sampling(cfg.eval.max_new_tokens), asked)
