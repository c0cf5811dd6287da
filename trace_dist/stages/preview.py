"""What a run would do, without doing it: what is trained, on what, how long and in how much memory.

Reads the data and the models' configs, never weights. Time is an estimate (``profiling.speed``) of probing, learning and scoring
by the method ``retrieved``; memory is that of ``memory estimate``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from trace_dist.config import ModelConfig, RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.config.granularity import Granularities
from trace_dist.continual.race import MOST_EXTENSIONS
from trace_dist.data.examples import text_of
from trace_dist.data.modality import TEXT
from trace_dist.data.tasks import Task, load_task
from trace_dist.models.loading import load_tokenizer
from trace_dist.profiling.estimate import Estimate, Estimator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.speed import UTILISATION, dense_flops, forward_flops, masked_flops, matmul_rate
from trace_dist.report.memory_tables import mib
from trace_dist.stages.probe import needs_probe
from trace_dist.utils import dist

CHARACTERS_PER_TOKEN = 4
"""Of English text, where no tokenizer is there yet."""
SAMPLE = 500
"""Training examples whose lengths are looked at."""


@dataclass(frozen=True)
class Work:
    """One piece of work of a run.

    Attributes:
        name: stage and task.
        detail: in words.
        steps: optimizer steps.
        flops: floating-point operations.
    """

    name: str
    detail: str
    steps: int
    flops: float


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Attributes:
        work: its pieces, in order.
        num_parameters: of the target; None while the target is not made.
        num_entries: masked entries; None while the target is not made.
        memory: on each rank; None while the target is not made.
        seconds: about how long the work takes on this machine.
        delta_bytes: of one task's delta on disk, about.
    """

    work: list[Work]
    num_parameters: int | None
    num_entries: int | None
    memory: Estimate | None
    seconds: float
    delta_bytes: int | None


def preview(cfg: RunConfig) -> Preview:
    """Work out what a run of this configuration would do.

    Raises:
        ValueError: a task's data are missing or malformed, a model has no readable config, or the tasks are no texts.
    """
    if cfg.data.modality != TEXT:
        raise ValueError(
            f"data.modality={cfg.data.modality!r}: only runs on texts are looked at beforehand; start it without --dry_run"
        )
    tasks = [load_task(task, cfg.seed, validate=cfg.train.eval_every > 0) for task in cfg.tasks]
    target, proxy = _estimator(cfg.target), _estimator(cfg.probed)
    tokenizer = None if target is None else load_tokenizer(cfg.target.path)
    lengths = [_tokens(task, tokenizer, cfg.data.max_length) for task in tasks]
    memory = None if target is None else target(_setup(cfg, max(longest for _, longest in lengths)))
    size = None if target is None else _size(target)
    means = [mean for mean, _ in lengths]
    work = list(_work(cfg, tasks, means, size or 0, _size(proxy) if proxy is not None else 0))
    device = dist.local_device()
    rate = matmul_rate(getattr(torch, cfg.target.dtype), device) * UTILISATION
    if device.type == "cuda":
        rate *= cfg.launch.num_ranks
    entries = None if memory is None else memory.num_entries
    bytes_per_entry = 3 if cfg.target.dtype == "bfloat16" else 5
    return Preview(
        work=work,
        num_parameters=None if memory is None else memory.num_parameters,
        num_entries=entries,
        memory=memory,
        seconds=sum(piece.flops for piece in work) / rate,
        delta_bytes=None if entries is None else entries * bytes_per_entry,
    )


def _estimator(model: ModelConfig) -> Estimator | None:
    """None where the model is made by the first run (tiny, GGUF, pruned) and is not there yet."""
    if model.made and not (Path(model.path) / "config.json").is_file():
        return None
    return Estimator(model.path, model.dtype)


def _size(estimator: Estimator) -> int:
    """Parameters outside the embeddings, which multiply nothing."""
    embedding = estimator.module.get_input_embeddings()
    return sum(estimator.numel.values()) - sum(p.numel() for p in embedding.parameters())


def _setup(cfg: RunConfig, longest: int) -> MemorySetup:
    on_cuda = dist.local_device().type == "cuda"
    return MemorySetup(
        model=cfg.target.path,
        density=cfg.largest.mask.share,
        granularity=cfg.mask.granularity,
        block=cfg.mask.block,
        maskable=cfg.mask.maskable,
        dtype=cfg.target.dtype,
        quantize=cfg.target.quantize,
        state_dtype=cfg.train.state_dtype,
        master=cfg.train.master,
        offload=cfg.train.offload,
        device="cuda" if on_cuda else "cpu",
        backend=cfg.backend,
        world_size=cfg.launch.num_ranks,
        micro_batch_size=min(cfg.train.micro_batch_size, -(-cfg.train.batch_size // cfg.launch.num_ranks)),
        sequence_length=max(2, min(longest, cfg.data.max_length)),
        activation_checkpointing=cfg.train.activation_checkpointing,
    )


def _tokens(task: Task, tokenizer: PreTrainedTokenizerBase | None, limit: int) -> tuple[float, int]:
    """Mean and largest number of tokens of a task's training examples; from their characters where there is no tokenizer."""
    some = task.train.select(range(min(SAMPLE, len(task.train))))
    texts = [text_of(prompt) + answer for prompt, answer in zip(some["prompt"], some["answer"], strict=True)]
    if tokenizer is None:
        lengths = [len(text) / CHARACTERS_PER_TOKEN + 1 for text in texts]
    else:
        lengths = [float(len(ids) + 1) for ids in tokenizer(texts)["input_ids"]]
    return min(limit, sum(lengths) / len(lengths)), min(limit, round(max(lengths)))


def _work(cfg: RunConfig, tasks: list[Task], means: list[float], target: int, proxy: int) -> Iterator[Work]:
    probe, train = cfg.probe, cfg.train
    rows = Granularities.parse(cfg.mask.granularity).all <= {"row", "column", "neuron"}
    if train.lr == AUTO:
        steps = len(cfg.race.grid) * min(cfg.race.steps, cfg.tasks[0].steps or train.steps)
        yield Work(
            f"race {tasks[0].name}",
            f"{len(cfg.race.grid)} learning rates, and at most {MOST_EXTENSIONS} beyond them",
            steps,
            masked_flops(target, means[0] * train.batch_size * steps, cfg.largest.mask.share, rows),
        )
    if cfg.mask.density == AUTO:
        raced = means[: cfg.race.tasks]
        trainings = len(cfg.race.densities) * len(cfg.race.grid)
        steps = trainings * sum(min(cfg.race.steps, t.steps or train.steps) for t in cfg.tasks[: len(raced)])
        tokens = sum(raced) / len(raced) * train.batch_size * steps
        yield Work(
            "race for a density",
            f"{len(cfg.race.densities)} densities with rates of their own, on {len(raced)} task(s)",
            steps,
            masked_flops(target, tokens, cfg.largest.mask.share, rows),
        )
    for task, options, mean in zip(tasks, cfg.tasks, means, strict=True):
        if needs_probe(cfg):
            warm, read = probe.num_steps(len(task.train)), probe.fisher_batch_size or probe.batch_size
            yield Work(
                f"probe {task.name}",
                f"{len(task.train):,} training examples",
                warm,
                dense_flops(proxy, mean * (warm * probe.batch_size + probe.fisher_batches * read)),
            )
        steps = options.steps or train.steps
        epochs = steps * train.batch_size / len(task.train)
        yield Work(
            f"learn {task.name}",
            f"{epochs:.1f} epochs of {len(task.train):,} examples, {mean:.0f} tokens each",
            steps,
            masked_flops(target, mean * train.batch_size * steps, cfg.largest.mask.share, rows),
        )
        if task.validation is not None:
            looks = -(-steps // train.eval_every)
            passes = 1 if train.eval_by == "loss" else 3
            yield Work(
                f"validate {task.name}",
                f"{looks} looks at {len(task.validation):,} examples, at most",
                0,
                forward_flops(target, passes * mean * len(task.validation) * looks),
            )
        yield Work(
            f"score {task.name}",
            f"{len(task.test):,} test examples",
            0,
            forward_flops(target, 2 * mean * len(task.test)),
        )


def describe(cfg: RunConfig, found: Preview) -> tuple[Table, list[str]]:
    """A preview as people read it: a table of the work, and lines about all of it."""
    table = Table("work", "what", "steps", "10^12 operations", title=f"what {cfg.run_dir} would do")
    for column in table.columns[2:]:
        column.justify = "right"
    for piece in found.work:
        operations = f"{piece.flops / 1e12:,.2g}" if found.num_parameters is not None else "?"
        table.add_row(piece.name, piece.detail, str(piece.steps or ""), operations)
    if found.memory is None:
        made = "the target is made by the first run (`trace-dist base`); its size, memory and time are known then"
        return table, [made]
    memory, where = (
        found.memory,
        f"on each of {cfg.launch.num_ranks} ranks" if cfg.launch.num_ranks > 1 else "on one rank",
    )
    lines = [
        f"trained: {found.num_entries:,} of {found.num_parameters:,} parameters; a task's delta takes about "
        f"{mib(found.delta_bytes)} on disk",
        f"memory {where}: {mib(memory.peak)} at the peak, {mib(sum(memory.states.values()))} between steps"
        + (f", {mib(sum(memory.host.values()))} in host memory" if any(memory.host.values()) else ""),
        f"time: about {_duration(found.seconds)} at {UTILISATION:.0%} of the rate at which this machine multiplies matrices",
    ]
    return table, lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
