"""Scores of a model on all test sets of a run, with or without retrieval of deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import nn

from trace_dist.bank.adapted import retrieve_adapted
from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.bound import error_bound
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature, fit_signature, parted
from trace_dist.config import RunConfig
from trace_dist.config.bank import Pooling
from trace_dist.continual.clarity import margins, typicality
from trace_dist.continual.examples import Answered, few
from trace_dist.continual.sample import seen_once
from trace_dist.continual.scored import Scored
from trace_dist.data.examples import prompt_key, references_of
from trace_dist.data.tasks import Task
from trace_dist.evaluation import Score, evaluate_task
from trace_dist.evaluation.lengths import longest_answer
from trace_dist.evaluation.metric import load_metric
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.workbench import Stream, Workbench


class Model(Protocol):
    """What is asked: a sharded model, or whatever holds a plain one."""

    @property
    def module(self) -> Any: ...
    def eval(self) -> Any: ...


class Bank(Protocol):
    """What is retrieved from: a bank of deltas, or of adapters."""

    @property
    def tasks(self) -> list[str]: ...
    @property
    def layer(self) -> int: ...
    @property
    def pooling(self) -> Pooling: ...
    @property
    def retriever(self) -> Retriever: ...
    def retrieve(self, representations: torch.Tensor, reject: float | None = None) -> list[str]: ...
    def activated(self, model: Any, task: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Row:
    """Scores at one stage.

    Attributes:
        tasks: percent per task.
        general: percent per general set that is answered.
        bits_per_byte: per general set that is text.
        per_example: task -> score of each test example, in [0, 1]; empty where it was not kept.
    """

    tasks: list[float]
    general: list[float]
    bits_per_byte: list[float]
    per_example: dict[str, list[float]] = field(default_factory=dict, compare=False)


@dataclass
class Judge:
    """Evaluates the tasks and the general sets of a run. Collective throughout."""

    cfg: RunConfig
    bench: Workbench
    _representations: dict[tuple[str, int, Pooling], torch.Tensor] = field(default_factory=dict)
    _answer_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def _general(self) -> list[Task]:
        return [stream.task for stream in self.bench.general]

    @property
    def _all(self) -> list[Task]:
        return [stream.task for stream in self.bench.tasks] + self._general

    @property
    def _task_names(self) -> list[str]:
        return [stream.task.name for stream in self.bench.tasks]

    @property
    def general_names(self) -> list[str]:
        """General sets that are scored in percent."""
        return [task.name for task in self._general if task.metric != "bits_per_byte"]

    @property
    def text_names(self) -> list[str]:
        """General sets that are scored in bits per byte."""
        return [task.name for task in self._general if task.metric == "bits_per_byte"]

    def _row(self, values: Mapping[str, float | Sequence[float]]) -> Row:
        """A row out of the scores of each answered set's examples, in [0, 1], and the bits per byte of each text."""
        each = {name: list(found) for name, found in values.items() if isinstance(found, Sequence)}
        shown = {**values, **{name: 100 * sum(found) / len(found) for name, found in each.items()}}
        tasks, general, texts = (
            [cast(float, shown[name]) for name in names]
            for names in (self._task_names, self.general_names, self.text_names)
        )
        return Row(tasks, general, texts, {name: each[name] for name in self._task_names if name in each})

    def named(self, row: Row) -> dict[str, float]:
        """A row's scores by task and general set."""
        names = self._task_names + self.general_names + self.text_names
        return dict(zip(names, [*row.tasks, *row.general, *row.bits_per_byte], strict=True))

    def score(self, module: nn.Module) -> Row:
        """Scores of the model as it is."""
        return self._row({task.name: self._scores(module, task) for task in self._all})

    def score_answers(self, module: nn.Module, answers: Callable[[Task], Sequence[str]]) -> Row:
        """Scores of what a function answers to the test examples of each set; of running text, those of the model as it is."""
        values: dict[str, float | list[float]] = {}
        for task in self._all:
            if task.metric == "bits_per_byte":
                values[task.name] = self.evaluate(module, task).value
                continue
            pairs = zip(answers(task), task.test, strict=True)
            values[task.name] = [float(said in references_of(row)) for said, row in pairs]
        return self._row(values)

    def _scores(self, module: nn.Module, task: Task) -> float | list[float]:
        """Of each example of an answered set; bits per byte of a text."""
        found = self.evaluate(module, task)
        return found.value if task.metric == "bits_per_byte" else found.per_example

    def evaluate(self, module: nn.Module, task: Task) -> Score:
        """Score of the model as it is on one test set."""
        module.eval()
        return evaluate_task(module, self.bench.tokenizer, task, self.cfg.eval, self.cfg.data)

    def score_retrieved(self, model: Model, bank: Bank, scored: Scored | None = None) -> Row:
        """Scores when every input is answered with the delta that its representation retrieves.

        Args:
            model: holds the base weights.
            bank: may hold tasks that are not of this run; an input can retrieve them too.
            scored: examples that it holds are not generated again; those that are generated are added.
        """
        model.eval()
        scored = Scored() if scored is None else scored
        texts = [task for task in self._all if task.metric == "bits_per_byte"]
        asked = [task for task in self._all if task.metric != "bits_per_byte"]
        routes = self.routes(model, bank)
        for name in dict.fromkeys(route for names in routes.values() for route in names):
            missing = {
                task.name: [
                    i
                    for i, route in enumerate(routes[task.name])
                    if route == name and i not in scored.of(name, task.name)
                ]
                for task in asked
            }
            if any(missing.values()):
                with bank.activated(model, name):
                    for task in asked:
                        indices = missing[task.name]
                        if indices:
                            scored.add(
                                name, task.name, indices, self._score_some(model.module, task, indices, name)
                            )
        values: dict[str, float | list[float]] = {}
        for task in texts:
            if task.name not in scored.texts:
                scored.texts[task.name] = self.evaluate(model.module, task).value
            values[task.name] = scored.texts[task.name]
        for task in asked:
            values[task.name] = [scored.of(route, task.name)[i] for i, route in enumerate(routes[task.name])]
        return self._row(values)

    def _score_some(self, module: nn.Module, task: Task, indices: list[int], route: str) -> Score:
        """Score of some test examples of a task, under the weights of the one that they retrieve."""
        taught = next((each.answers for each in self._all if each.name == route), None)
        some = replace(task, test=task.test.select(indices), among=taught)
        return evaluate_task(
            module,
            self.bench.tokenizer,
            some,
            self.cfg.eval,
            self.cfg.data,
            answer_tokens=self._longest_answer(task),
        )

    def _longest_answer(self, task: Task) -> int | None:
        """Tokens of the longest reference of all its test examples; None where nothing is generated."""
        if load_metric(task).compare is None:
            return None
        if task.name not in self._answer_tokens:
            self._answer_tokens[task.name] = longest_answer(self.bench.tokenizer, task.test.to_list())
        return self._answer_tokens[task.name]

    def route(self, model: Model, bank: Bank, task: Task) -> list[str]:
        """Name of the delta (or ``base``) for each test prompt of a task."""
        if not bank.tasks:
            return [BASE] * len(task.test)
        base, cfg = self.representations(model, task, bank.layer, bank.pooling), self.cfg.bank
        if not self._tries_weights(bank):
            return bank.retrieve(base, cfg.reject)
        prompts = task.test["prompt"][:]

        def represent_rows(rows: Sequence[int]) -> torch.Tensor:
            return self.represent(model, [prompts[row] for row in rows], bank.layer, bank.pooling)

        return retrieve_adapted(
            cast(DeltaBank, bank),
            cast(ShardedModel, model),
            base,
            represent_rows,
            candidates=cfg.candidates,
            reject=cfg.reject,
        )

    def _tries_weights(self, bank: Bank) -> bool:
        """Whether prompts are represented under the candidates' own weights."""
        return self.cfg.bank.representation != "base" and isinstance(bank, DeltaBank)

    def routes(self, model: Model, bank: Bank) -> dict[str, list[str]]:
        """``route`` of every set whose prompts are answered."""
        return {
            task.name: self.route(model, bank, task) for task in self._all if task.metric != "bits_per_byte"
        }

    def retrieval(self, model: Model, bank: Bank, scored: Scored) -> dict[str, Any]:
        """Where the tasks' test prompts go, how clearly, and what was answered; the bound on the error. JSON-ready.

        The bound, ``margins`` and ``rejection`` are those of the base's representations, and are left out where others decide.
        """
        columns, tasks = bank.tasks, [stream.task for stream in self.bench.tasks]
        routes = {task.name: self.route(model, bank, task) for task in tasks}
        right = sum(found.count(task) for task, found in routes.items())
        limits = {} if self._tries_weights(bank) else error_bound(bank.retriever).to_json()
        return {
            **limits,
            "accuracy": 100 * right / sum(map(len, routes.values())),
            "tasks": list(routes),
            "columns": columns,
            "confusion": [[found.count(name) for name in columns] for found in routes.values()],
            "num_clusters": sum(len(signature.weights) for signature in bank.retriever.signatures),
            **self._clarity(model, bank, tasks),
            "examples": [each.to_json() for each in self._answered(tasks, routes, scored)],
        }

    def _clarity(self, model: Model, bank: Bank, tasks: list[Task]) -> dict[str, Any]:
        """Margins, and typicality where prompts are rejected; of equal values on every rank."""
        if self._tries_weights(bank):
            return {}
        retriever, reject = bank.retriever, self.cfg.bank.reject
        prompts = {task.name: self.representations(model, task, bank.layer, bank.pooling) for task in tasks}
        found = {"margins": margins(retriever, prompts)}
        return found if reject is None else found | {"rejection": typicality(retriever, prompts, reject)}

    def _answered(self, tasks: list[Task], routes: dict[str, list[str]], scored: Scored) -> list[Answered]:
        """A few examples of each task that the bank answers now as it did when they were scored."""
        found = []
        for task in tasks:
            answers = {
                i: (delta, said)
                for delta, sets in scored.answers.items()
                for i, said in sets.get(task.name, {}).items()
                if routes[task.name][i] == delta
            }
            scores = {i: scored.of(delta, task.name)[i] for i, (delta, _) in answers.items()}
            found += [Answered.of(task.name, task.test[i], *answers[i], scores[i]) for i in few(scores)]
        return found

    def representations(
        self, model: Model, task: Task, layer: int, pooling: Pooling = "mean"
    ) -> torch.Tensor:
        """Representations of a task's test prompts under the base: [N, D] fp32."""
        key = task.name, layer, pooling
        if key not in self._representations:
            self._representations[key] = self.represent(model, task.test["prompt"][:], layer, pooling)
        return self._representations[key]

    def represent(self, model: Model, prompts: Any, layer: int, pooling: Pooling = "mean") -> torch.Tensor:
        """Representations of prompts under the model as it is: [N, D] fp32."""
        return self.represent_views(model, prompts, [layer], [pooling])[pooling][:, 0]

    def represent_views(
        self, model: Model, prompts: Any, layers: Sequence[int], poolings: Sequence[Pooling]
    ) -> dict[Pooling, torch.Tensor]:
        """Representations of prompts by several layers and poolings of the model as it is: by pooling, [N, L, D] fp32."""
        model.eval()
        return self.bench.modality.represent(
            model.module,
            list(prompts),
            self.bench.tokenizer,
            self.cfg.data,
            layers=layers,
            poolings=poolings,
            batch_size=self.cfg.eval.batch_size,
        )

    def signature(
        self, model: Model, streams: list[Stream], name: str, layer: int, pooling: Pooling = "mean"
    ) -> Signature:
        """Fit the signature of a task (or of the general sets together) from training prompts under the model as it is."""
        x = self.represent(model, self._prompts(streams), layer, pooling)
        bank = self.cfg.bank
        return fit_signature(x, bank.clusters * len(streams), self.cfg.seed, name, kind=bank.signature)

    def held_out(self, streams: list[Stream]) -> set[str]:
        """Keys of the prompts that the ``signature`` of these streams is not fitted to; limits on errors rest on them."""
        prompts = self._prompts(streams)
        _, apart = parted(len(prompts), self.cfg.seed)
        return {prompt_key(prompts[place]) for place in apart}

    def _prompts(self, streams: list[Stream]) -> list[Any]:
        """Training prompts of a signature."""
        per_stream = -(-self.cfg.bank.num_prompts // len(streams))
        return [prompt for stream in streams for prompt in seen_once(stream.task, per_stream)]
