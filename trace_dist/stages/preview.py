"""What a run would do, without doing it: what is trained, on what, how long and in how much memory.

Reads the data and the models' configs, never weights. Each stage that the run would start has its pieces of work
(``stages.effort``); memory is that of ``memory estimate``, of the method that needs most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from trace_dist.config import RunConfig
from trace_dist.data.examples import text_of
from trace_dist.data.modality import TEXT
from trace_dist.data.tasks import Task
from trace_dist.evaluation.lengths import longest_answer
from trace_dist.evaluation.metric import load_metric
from trace_dist.models.loading import load_tokenizer
from trace_dist.profiling.disk import disk_bytes
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.passes import num_operators
from trace_dist.profiling.speed import UTILISATION, Machine
from trace_dist.report.memory_tables import mib
from trace_dist.stages.effort import Outlook, Work, pieces
from trace_dist.stages.needs import Need, Needs, estimator_of, estimator_of_proxy, of_probe
from trace_dist.stages.pipeline import stage_groups
from trace_dist.stages.stage import Stage
from trace_dist.train.workbench import Tasks
from trace_dist.utils import dist

CHARACTERS_PER_TOKEN = 4
"""Of English text, where no tokenizer is there yet."""
SAMPLE = 500
"""Training examples whose lengths are looked at."""


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        work: its pieces, in order; one at least of each stage.
        num_parameters: of the target; None while the target is not made.
        num_entries: masked entries; None while the target is not made.
        memory: of every method and of the probe, as far as their models are known.
        seconds: about how long this machine computes for the work whose operations are known.
        num_starts: processes that start one after another; each loads the libraries, the data and a model.
        delta_bytes: of one task's delta on disk, about.
    """

    work: list[Work]
    num_parameters: int | None
    num_entries: int | None
    memory: list[Need]
    seconds: float
    num_starts: int
    delta_bytes: int | None

    @property
    def unknown(self) -> list[str]:
        """Work whose operations are not known yet, so that ``seconds`` lacks it."""
        return [piece.name for piece in self.work if piece.flops is None]


def preview(
    cfg: RunConfig, groups: Sequence[Sequence[Stage]] | None = None, mask_given: bool = False
) -> Preview:
    """Work out what a run of this configuration would do.

    Args:
        cfg: the run.
        groups: its stages; those of ``run`` when None.
        mask_given: whether the tasks' masks need not be made.

    Raises:
        ValueError: a task's data are missing or malformed or do not fit a model, a model has no readable config, a method does
            not fit the run, or the tasks are no texts.
    """
    if cfg.data.modality != TEXT:
        raise ValueError(
            f"data.modality={cfg.data.modality!r}: only runs on texts are looked at beforehand; start it without --dry_run"
        )
    groups = stage_groups(cfg) if groups is None else groups
    stages = list({stage.name: stage for group in groups for stage in group}.values())
    data = Tasks.load(cfg)
    tasks, general = data.tasks, data.general
    target = estimator_of(cfg.target)
    proxy = estimator_of_proxy(cfg, target)
    tokenizer = None if target is None else load_tokenizer(cfg.target.path)
    lengths = {task.name: _tokens(task, tokenizer, cfg.data.max_length) for task in (*tasks, *general)}
    tokens = {name: mean for name, (mean, _) in lengths.items()}
    answers = {task.name: _answer_tokens(task, tokenizer, cfg) for task in (*tasks, *general)}
    outlook = Outlook(cfg, tasks, general, tokens, answers, _size(target), _size(proxy), mask_given)
    work = [piece for stage in stages for piece in pieces(stage, outlook)]
    masked, memory, delta_bytes = None, list[Need](), None
    longest = max(lengths[task.name][1] for task in tasks)
    if target is not None:
        needs = Needs(cfg, longest, target)
        masked, delta_bytes = needs.masked(), disk_bytes(target, needs.setup).delta
        memory += [*needs.of_methods(), *needs.of_stages(stages)]
    if proxy is not None and any(stage.arguments[0] == "probe" for stage in stages):
        memory.append(of_probe(cfg, longest, proxy))
    left = [stage for stage in stages if not stage.done]
    return Preview(
        work=work,
        num_parameters=None if masked is None else masked.num_parameters,
        num_entries=None if masked is None else masked.num_entries,
        memory=memory,
        seconds=_seconds(cfg, work, target, proxy, round(cfg.train.micro_batch_size * longest)),
        # A launcher is a process too, which its ranks wait for.
        num_starts=sum(1 + (stage.launched and cfg.launch.launcher != "none") for stage in left),
        delta_bytes=delta_bytes,
    )


def _seconds(
    cfg: RunConfig, work: list[Work], target: Estimator | None, proxy: Estimator | None, num_tokens: int
) -> float:
    """How long this device takes for the work whose operations are known: products, and what small models take beside them."""
    device = dist.local_device()
    modules = {
        of_proxy: model.module for of_proxy, model in ((False, target), (True, proxy)) if model is not None
    }
    if not modules:
        return 0.0
    models = {of_proxy: num_operators(module) for of_proxy, module in modules.items()}
    width = max(module.config.get_text_config().hidden_size for module in modules.values())
    machine = Machine.measured(getattr(torch, cfg.target.dtype), device, width, num_tokens)
    # The ranks of a CPU share its cores.
    ranks = cfg.launch.num_ranks if device.type == "cuda" else 1
    return sum(
        machine.seconds(piece.flops, piece.passes, models[piece.of_proxy], ranks if piece.launched else 1)
        for piece in work
        if piece.flops
    )


def _size(estimator: Estimator | None) -> int | None:
    """Parameters that multiply a token: outside the embeddings, and of the experts those that it is sent to."""
    if estimator is None:
        return None
    module = estimator.module
    asked = getattr(module.config.get_text_config(), "num_experts_per_tok", None)
    idle = sum(
        p.numel() // len(p) * max(0, len(p) - asked)
        for name, p in module.named_parameters()
        if asked is not None and p.ndim == 3 and "experts" in name.split(".")
    )
    embedding = sum(p.numel() for p in module.get_input_embeddings().parameters())
    return sum(estimator.numel.values()) - embedding - idle


def _tokens(task: Task, tokenizer: PreTrainedTokenizerBase | None, limit: int) -> tuple[float, int]:
    """Mean and largest number of tokens of a task's training examples; from their characters where there is no tokenizer."""
    some = task.train.select(range(min(SAMPLE, len(task.train))))
    texts = [text_of(prompt) + answer for prompt, answer in zip(some["prompt"], some["answer"], strict=True)]
    if tokenizer is None:
        lengths = [len(text) / CHARACTERS_PER_TOKEN + 1 for text in texts]
    else:
        lengths = [float(len(ids) + 1) for ids in tokenizer(texts)["input_ids"]]
    return min(limit, sum(lengths) / len(lengths)), min(limit, round(max(lengths)))


def _answer_tokens(task: Task, tokenizer: PreTrainedTokenizerBase | None, cfg: RunConfig) -> int:
    """Tokens that are generated for an answer at most; one where nothing is generated."""
    if load_metric(task).compare is None:
        return 1
    if cfg.eval.max_new_tokens is not None:
        return cfg.eval.max_new_tokens
    some = task.test.select(range(min(SAMPLE, len(task.test))))
    if tokenizer is None:
        return 1 + max(len(answer) for answer in some["answer"]) // CHARACTERS_PER_TOKEN
    return longest_answer(tokenizer, some.to_list()) + 1


def describe(cfg: RunConfig, found: Preview, start_seconds: float = 0.0) -> tuple[Table, list[str]]:
    """A preview as people read it: a table of the work, and lines about all of it.

    Args:
        cfg: the run.
        found: its preview.
        start_seconds: how long a process takes to start on this machine.
    """
    table = Table("stage", "work", "what", "steps", "10^12 operations", title=f"what {cfg.run_dir} would do")
    for column in table.columns[3:]:
        column.justify = "right"
    before = None
    for piece in found.work:
        operations = "?" if piece.flops is None else f"{piece.flops / 1e12:,.2g}"
        stage = piece.stage if piece.stage != before else ""
        table.add_row(stage, piece.name, piece.detail, str(piece.steps or ""), operations)
        before = piece.stage
    lines = []
    if found.num_entries is None:
        lines.append(
            "the target is made by the first run (`trace-dist base`); its size, memory and time are known then"
        )
    else:
        lines.append(
            f"trained: {found.num_entries:,} of {found.num_parameters:,} parameters; a task's delta takes about "
            f"{mib(found.delta_bytes)} on disk"
        )
    lines += _memory_lines(found)
    if found.num_entries is not None:
        starting = found.num_starts * start_seconds
        lines.append(
            f"time: about {_duration(found.seconds + starting)} on this machine: {_duration(found.seconds)} of computing, by "
            f"what matrix products ({UTILISATION:.0%} of their full rate) and small operators took just now, and "
            f"{_duration(starting)} to start {found.num_starts} processes one after another"
        )
        if found.unknown:
            lines.append(f"not in it, since a model is not made yet: {', '.join(found.unknown)}")
    return table, lines


def _memory_lines(found: Preview) -> Iterator[str]:
    """The most that is needed on ranks, and in one process."""
    kinds: Mapping[str, list[Need]] = {
        "memory on each of {ranks} ranks": [need for need in found.memory if need.num_ranks > 1],
        "memory in one process": [need for need in found.memory if need.num_ranks == 1],
    }
    for what, needs in kinds.items():
        if not needs:
            continue
        most = max(needs, key=lambda need: need.estimate.peak)
        states, host = sum(most.estimate.states.values()), sum(most.estimate.host.values())
        yield (
            f"{what.format(ranks=most.num_ranks)}: {mib(most.estimate.peak)} at the peak ({most.what}), "
            + f"{mib(states)} between steps"
            + (f", {mib(host)} in host memory" if host else "")
            + "".join(f"; {need.what} {mib(need.estimate.peak)}" for need in needs if need is not most)
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
