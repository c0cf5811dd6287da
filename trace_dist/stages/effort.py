"""What a stage would do, piece by piece, before it is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.continual.driver import Entry, check_methods
from trace_dist.continual.race import MOST_EXTENSIONS
from trace_dist.data.tasks import Task
from trace_dist.data.validation import MOST_HELDOUT
from trace_dist.probe.importance.contrast import contrasts
from trace_dist.profiling.speed import BACKWARD_PASSES, dense_flops, forward_flops, masked_flops, step_passes
from trace_dist.projection.project import needs_proxy, num_batches
from trace_dist.stages import base, continual
from trace_dist.stages.memory import EXAMPLES_PER_RANK, MEASURED_STEPS
from trace_dist.stages.stage import Stage

Size = int | None
"""Parameters of a model that multiply a token (``preview``); None where it is not known yet."""


@dataclass(frozen=True)
class Work:
    """One piece of work of a run.

    Attributes:
        stage: name of the stage that does it.
        name: what it is.
        detail: in words.
        steps: optimizer steps.
        flops: floating-point operations; None where they are not known yet.
        launched: whether all ranks share it.
        passes: forward passes that a rank makes one after another, or what takes as long (``profiling.speed``).
        of_proxy: whether the model is the one that is probed.
    """

    stage: str
    name: str
    detail: str
    steps: int
    flops: float | None
    launched: bool = False
    passes: float = 0.0
    of_proxy: bool = False


@dataclass(frozen=True)
class Outlook:
    """What is known before a run.

    Attributes:
        cfg: the run.
        tasks: its tasks.
        general: its general sets.
        tokens: task or general set -> tokens of a training example, on average.
        target: size of the target.
        proxy: size of the model that is probed.
        mask_given: whether the tasks' masks need not be made.
        answers: task or general set -> tokens that are generated of an answer: the longest reference, with its end.
    """

    cfg: RunConfig
    tasks: list[Task]
    general: list[Task]
    tokens: Mapping[str, float]
    answers: Mapping[str, int]
    target: Size
    proxy: Size
    mask_given: bool = False

    def steps(self) -> list[int]:
        """Optimizer steps of each task."""
        return [task.steps or self.cfg.train.steps for task in self.cfg.tasks]

    def raced(self) -> tuple[int, float]:
        """Optimizer steps, and tokens, with which one rate of a race trains."""
        race, size = self.cfg.race, self.cfg.train.batch_size
        steps = [min(race.steps, count) for count in self.steps()[: race.tasks]]
        tokens = (
            self.tokens[task.name] * size * count for task, count in zip(self.tasks, steps, strict=False)
        )
        return sum(steps), sum(tokens)

    def ranks(self, launched: bool) -> int:
        """Ranks that share a piece of work."""
        return self.cfg.launch.num_ranks if launched else 1

    def groups(self, launched: bool) -> int:
        """Ranks, or groups of ranks that share rows, among which the examples of a training step are divided."""
        ranks, size = self.ranks(launched), self.cfg.train.sequence_parallel
        return ranks // size if ranks % size == 0 else ranks

    @property
    def recomputes(self) -> bool:
        """Whether trainings recompute activations."""
        return self.cfg.train.activation_checkpointing

    def dense_flops(self, num_parameters: int, num_tokens: float) -> float:
        """Operations of training every weight."""
        return dense_flops(num_parameters, num_tokens, self.recomputes)

    def step_passes(self, steps: int, launched: bool = False, batch_size: int | None = None) -> float:
        """Forward passes as long as some steps of training, of its batches unless told otherwise."""
        train = self.cfg.train
        size = train.batch_size if batch_size is None else batch_size
        return step_passes(steps, size, train.micro_batch_size, self.groups(launched), self.recomputes)

    def gradient_passes(self, count: int, launched: bool, batch_size: int) -> float:
        """As many for steps outside of training, where ranks share no rows and nothing is recomputed."""
        return step_passes(count, batch_size, self.cfg.train.micro_batch_size, self.ranks(launched))

    def read_passes(self, count: int, launched: bool = False) -> float:
        """Forward passes over so many examples."""
        return -(-count // (self.cfg.eval.batch_size * self.ranks(launched)))

    def mean_general(self) -> float:
        """Tokens of a general example, on average."""
        return sum(self.tokens[task.name] for task in self.general) / max(1, len(self.general))


def pieces(stage: Stage, seen: Outlook) -> Iterator[Work]:
    """What a stage would do; at least one piece."""
    if stage.done:
        yield Work(stage.name, "-", "is there", 0, 0.0)
        return
    yield from WORK[stage.arguments[0]](stage, seen)


def _known(size: Size, flops: Callable[[int], float]) -> float | None:
    return None if size is None else flops(size)


def _base(stage: Stage, seen: Outlook) -> Iterator[Work]:
    model = seen.cfg.target if "target" in stage.arguments else seen.cfg.probed
    if model.tiny is None:
        yield Work(stage.name, "convert", str(model.gguf), 0, 0.0)
        return
    yield _pretrained(stage, seen, "pretrain", model.tiny.steps, model.tiny.batch_size, None)


def _pretrained(stage: Stage, seen: Outlook, name: str, steps: int, batch_size: int, size: Size) -> Work:
    tokens = steps * batch_size * seen.mean_general()
    flops = _known(size, lambda p: seen.dense_flops(p, tokens))
    detail, passes = f"on {len(seen.general)} general sets", seen.step_passes(steps, batch_size=batch_size)
    of_proxy = "target" not in stage.arguments
    return Work(stage.name, name, detail, steps, flops if steps else 0.0, passes=passes, of_proxy=of_proxy)


def _probe(stage: Stage, seen: Outlook) -> Iterator[Work]:
    cfg, probe = seen.cfg, seen.cfg.probe
    if cfg.proxy is not None and not base.describe(cfg, "proxy").done:
        tiny, prune = cfg.proxy.tiny, cfg.proxy.prune
        if prune is not None:
            steps = prune.heal_steps
            name = "cut out and heal the proxy" if steps else "cut out the proxy"
            yield _pretrained(stage, seen, name, steps, cfg.train.batch_size, seen.proxy)
        elif tiny is not None:
            yield _pretrained(stage, seen, "pretrain the proxy", tiny.steps, tiny.batch_size, None)
    for task in [*seen.tasks, *(seen.general if contrasts(probe.score) else [])]:
        warm, read = probe.num_steps(len(task.train)), probe.fisher_batch_size or probe.batch_size
        tokens = seen.tokens[task.name] * (warm * probe.batch_size + probe.fisher_batches * read)
        flops = _known(seen.proxy, lambda p, tokens=tokens: seen.dense_flops(p, tokens))  # type: ignore[misc]
        passes = seen.step_passes(warm, batch_size=probe.batch_size)
        passes += seen.step_passes(probe.fisher_batches, batch_size=read)
        detail = f"{len(task.train):,} training examples"
        yield Work(stage.name, f"probe {task.name}", detail, warm, flops, passes=passes, of_proxy=True)


def _project(stage: Stage, seen: Outlook) -> Iterator[Work]:
    cfg = seen.cfg
    chosen_before = needs_proxy(cfg.projection) and (cfg.proxy is None or cfg.mask.granularity == "tensor")
    count = 0 if chosen_before else num_batches(cfg.projection, cfg.probe)
    for task in seen.tasks:
        tokens = count * cfg.probe.batch_size * seen.tokens[task.name]
        detail = f"{cfg.projection.placement}: {count} batches of {cfg.probe.batch_size} examples"
        flops = _known(seen.target, lambda p, tokens=tokens: dense_flops(p, tokens))  # type: ignore[misc]
        if count == 0:
            detail, flops = "weights alone are looked at", 0.0
        passes = seen.gradient_passes(count, stage.launched, cfg.probe.batch_size)
        yield Work(stage.name, f"project {task.name}", detail, 0, flops, stage.launched, passes)


def _memory(stage: Stage, seen: Outlook) -> Iterator[Work]:
    cfg, task = seen.cfg, seen.tasks[0]
    examples = min(cfg.train.batch_size, EXAMPLES_PER_RANK * cfg.launch.num_ranks)
    tokens = MEASURED_STEPS * examples * seen.tokens[task.name]
    mask = cfg.largest.mask
    flops = _known(
        seen.target, lambda p: masked_flops(p, tokens, mask.share, mask.in_lines) + dense_flops(p, tokens)
    )
    detail = "masked and full training, a few steps each"
    passes = seen.gradient_passes(2 * MEASURED_STEPS, stage.launched, examples)
    yield Work(stage.name, "measure memory", detail, 2 * MEASURED_STEPS, flops, stage.launched, passes)


def _continual(stage: Stage, seen: Outlook) -> Iterator[Work]:
    cfg = seen.cfg
    names = stage.arguments[2].strip("[]").split(",")
    if stage.launched and continual.projects(names) and not seen.mask_given:
        yield from _project(stage, seen)
    entries = check_methods(cfg)
    if cfg.mask.density == AUTO and entries[0].name in names:
        yield _density_race(stage, seen)
    for entry in entries:
        if entry.name in names:
            if cfg.folder.method(entry.name).is_file():
                yield Work(stage.name, f"{entry.name}: -", "is there", 0, 0.0)
            else:
                yield from _method(stage, seen, entry)


def _method(stage: Stage, seen: Outlook, entry: Entry) -> Iterator[Work]:
    kind = entry.kind
    if kind.races(entry.options, seen.cfg):
        yield _race(stage, seen, entry)
    if kind.teaches:
        yield _teaching(stage, seen, entry)
    for number, task in enumerate(seen.tasks if kind.trains else [], start=1):
        steps = kind.num_steps(entry.options, seen.cfg, seen.steps()[:number])
        yield _learning(stage, seen, entry, number, steps)
        if task.validation is not None and not kind.teaches:
            yield _looking(stage, seen, entry, task, steps)
    yield _scoring(stage, seen, entry)


def _part(
    stage: Stage,
    seen: Outlook,
    name: str,
    detail: str,
    passes: float,
    flops: Callable[[int], float],
    steps: int = 0,
) -> Work:
    """A piece of a method, on the target."""
    return Work(stage.name, name, detail, steps, _known(seen.target, flops), stage.launched, passes)


def _teaching(stage: Stage, seen: Outlook, entry: Entry) -> Work:
    """The bank answers the prompts that it has kept, and the base those of the general sets."""
    options = entry.options
    most = [count for count in (seen.cfg.bank.keep_prompts, getattr(options, "prompts", None)) if count]
    tasks = [*seen.tasks, *(seen.general if getattr(options, "general", 0.0) else [])]
    asked = {task.name: min([len(task.train), *most]) for task in tasks}
    tokens = sum(2 * seen.tokens[task] * count for task, count in asked.items())
    passes = sum(
        seen.read_passes(count, stage.launched) * (1 + seen.answers[task]) for task, count in asked.items()
    )
    detail = f"{sum(asked.values()):,} prompts, by each task's delta"
    name = f"{entry.name}: answers to learn from"
    return _part(stage, seen, name, detail, passes, lambda p: forward_flops(p, tokens))


def _learning(stage: Stage, seen: Outlook, entry: Entry, number: int, steps: int) -> Work:
    """The training of the task of a number, from 1."""
    cfg, task = seen.cfg, seen.tasks[number - 1]
    mean, examples = seen.tokens[task.name], steps * cfg.train.batch_size
    detail = (
        f"{examples / len(task.train):.1f} epochs of {len(task.train):,} examples, {mean:.0f} tokens each"
    )
    if number > 1 and steps != seen.steps()[number - 1]:
        detail = f"{examples:,} examples of all tasks so far"
    passes = seen.step_passes(steps, stage.launched)
    name = f"{entry.name}: learn {task.name}"
    return _part(
        stage, seen, name, detail, passes, lambda p: entry.kind.flops(cfg, p, mean * examples), steps
    )


def _looking(stage: Stage, seen: Outlook, entry: Entry, task: Task, steps: int) -> Work:
    """The looks at a task's validation examples while it is trained; a score is generated, which takes longer than a loss."""
    train, validation = seen.cfg.train, task.validation or []
    looks, scored = -(-steps // train.eval_every), train.eval_by != "loss"
    tokens = (3 if scored else 1) * seen.tokens[task.name] * len(validation) * looks
    ranks = seen.ranks(stage.launched)
    passes = looks * step_passes(1, len(validation), train.micro_batch_size, ranks) / (1 + BACKWARD_PASSES)
    if scored:
        passes += looks * seen.read_passes(len(validation), stage.launched) * seen.answers[task.name]
    detail = f"{looks} looks at {len(validation):,} examples, at most"
    name = f"{entry.name}: validate {task.name}"
    return _part(stage, seen, name, detail, passes, lambda p: forward_flops(p, tokens))


def _scoring(stage: Stage, seen: Outlook, entry: Entry) -> Work:
    """All scores after the tasks. Answers are generated after a pass over the prompt."""
    times = entry.kind.num_scorings(len(seen.tasks))
    tests = [*seen.tasks, *seen.general]
    tokens = sum(2 * times * seen.tokens[task.name] * len(task.test) for task in tests)
    # Each answer is decoded token by token; its prompt is read once more to be retrieved by, as are those of signatures.
    read = len(seen.tasks) * seen.read_passes(seen.cfg.bank.num_prompts, stage.launched)
    decoded = sum(
        seen.read_passes(len(task.test), stage.launched) * (1 + seen.answers[task.name]) for task in tests
    )
    detail = f"{sum(len(task.test) for task in tests):,} test examples, {times} times"
    passes = times * decoded + read
    return _part(stage, seen, f"{entry.name}: score", detail, passes, lambda p: forward_flops(p, tokens))


def _race(stage: Stage, seen: Outlook, entry: Entry) -> Work:
    cfg, race = seen.cfg, seen.cfg.race
    raced, (steps, trained) = seen.tasks[: race.tasks], seen.raced()
    held = sum(
        seen.tokens[task.name]
        * (
            min(race.heldout, MOST_HELDOUT * len(task.train))
            if task.validation is None
            else len(task.validation)
        )
        for task in raced
    )
    count = len(race.grid)
    return Work(
        stage.name,
        f"{entry.name}: race on {' and '.join(task.name for task in raced)}",
        f"{count} learning rates, and at most {MOST_EXTENSIONS} beyond them",
        count * steps,
        _known(seen.target, lambda p: count * (entry.kind.flops(cfg, p, trained) + forward_flops(p, held))),
        stage.launched,
        count * seen.step_passes(steps, stage.launched),
    )


def _density_race(stage: Stage, seen: Outlook) -> Work:
    race, mask = seen.cfg.race, seen.cfg.largest.mask
    trainings = len(race.densities) * len(race.grid)
    steps, tokens = seen.raced()
    return Work(
        stage.name,
        "race for a density",
        f"{len(race.densities)} densities with {len(race.grid)} learning rates each, on "
        f"{len(seen.tasks[: race.tasks])} task(s)",
        trainings * steps,
        _known(
            seen.target,
            lambda p: masked_flops(p, trainings * tokens, mask.share, mask.in_lines, seen.recomputes),
        ),
        stage.launched,
        trainings * seen.step_passes(steps, stage.launched),
    )


WORK: dict[str, Callable[[Stage, Outlook], Iterator[Work]]] = {
    "base": _base,
    "probe": _probe,
    "project": _project,
    "memory": _memory,
    "continual": _continual,
}
"""Command of a stage -> its pieces."""
