"""What is composition worth? New tasks learned beside a bank, from the base and from a combination of the earlier deltas.

    python -m trace_dist.studies.transfer --config configs/transfer.yaml --out docs/results/transfer.json

[Note: arms] The base is trained once. Each seed draws masks and examples, and learns the ``earlier`` tasks into a bank. Every
other task is then learned beside a copy of that bank by these arms, with the same mask, order of examples and peak learning
rate. Masks are random and share no entry, so that nothing depends on a probe:

    base       from the base
    composed   ``bank.composition: combination``, as many steps
    half       of related tasks: the same, but all examples together are half as many, with a whole schedule of its own

``related`` tasks come from the generator of an earlier task, with other lengths or sizes; ``unrelated`` ones from others. Which
is which stands in the configuration, before anything is trained.

[Note: steps to a loss] Every ``train.eval_every`` steps validation examples are looked at. The loss that is asked for is the
one with which ``base`` ends, and the steps to it are those up to the first look at or below it. The examples that fit and trial
read count as well, in steps of as many. Final losses are those of test examples, which decide nothing. (Validation examples
decide whether a combination is taken.)

A training with a record is not done again, so a study that was cut goes on.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.delta import applied
from trace_dist.config import RunConfig
from trace_dist.config.checks import check
from trace_dist.continual.learn import learn_task
from trace_dist.continual.setting import Setting
from trace_dist.evaluation.passes import evaluating
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, random_mask, tensor_seed
from trace_dist.parts import STARTS
from trace_dist.stages.base import prepare_base
from trace_dist.studies.transfer_summary import summary
from trace_dist.train.loss import accumulate
from trace_dist.train.workbench import Stream
from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.registry import instance

ARMS = {"related": ("base", "composed", "half"), "unrelated": ("base", "composed")}
METHOD = "retrieved"


@dataclass(frozen=True)
class Plan:
    """The run, and what each of its tasks is there for."""

    cfg: RunConfig
    earlier: tuple[str, ...]
    related: tuple[str, ...]
    unrelated: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Plan:
        """A plan's file.

        Raises:
            ValueError: it names a task that the run has not, or leaves one out.
        """
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        cfg = instance(RunConfig, value["run"], f"{path}: run")
        named = {key: tuple(value[key]) for key in ("earlier", *ARMS)}
        tasks, together = (
            [task.name for task in cfg.tasks],
            [name for names in named.values() for name in names],
        )
        rule = "earlier, related and unrelated must name each of them once"
        check(sorted(together) == sorted(tasks), "run.tasks", tasks, rule, f"they name {together}")
        return cls(cfg, **named)

    def of_seed(self, seed: int) -> RunConfig:
        """The run of a seed; its base is that of all seeds."""
        return replace(self.cfg, run_dir=str(Path(self.cfg.run_dir) / f"seed{seed}"), seed=seed)

    def learned(self) -> Iterator[tuple[str, str, str]]:
        """Each training of a new task: its name, its group and its arm."""
        for group, arms in ARMS.items():
            for name in getattr(self, group):
                for arm in arms:
                    yield name, group, arm


def with_tasks(cfg: RunConfig, names: tuple[str, ...], bank: Path, composition: str = "none") -> RunConfig:
    """A run of some of the tasks, into a bank of its own."""
    tasks = [task for task in cfg.tasks if task.name in names]
    options = cfg.bank.composition_options if composition != "none" else {}
    own = replace(cfg.bank, path=str(bank), composition=composition, composition_options=options)
    return replace(cfg, tasks=tasks, bank=own)


def earlier_bank(plan: Plan, cfg: RunConfig) -> Path:
    """The bank of the earlier tasks, learned as far as that was not done before."""
    folder = cfg.folder.root / "bank_earlier"
    own = with_tasks(cfg, plan.earlier, folder)
    setting = Setting.load(own)
    bank = DeltaBank.create(folder, setting.fingerprint, int(cfg.bank.layer))
    for stream in setting.bench.tasks:
        if stream.task.name not in bank.tasks:
            learn_task(setting, bank, stream, drawn_mask(setting, bank, stream.task.name), name=METHOD)
    return folder


def drawn_mask(setting: Setting, bank: DeltaBank, task: str) -> Mask:
    """Random entries that no task of the bank has; the same for each arm."""
    cfg, earlier = setting.cfg.mask, [name for name in bank.tasks if name not in (BASE, task)]
    layouts = layouts_for(setting.model, cfg.granularity, cfg.block, cfg.maskable)
    refused = setting.isolation.refused(layouts, map(bank.mask, earlier))
    mask = random_mask(layouts, cfg.granularity, cfg.share, tensor_seed(setting.cfg.seed, task), refused)
    return mask.with_meta(task=task, model=setting.fingerprint, isolation=cfg.isolation, earlier=earlier)


def run_arm(setting: Setting, stream: Stream, arm: str, earlier: Path) -> dict[str, Any]:
    """Learn a task beside a copy of the bank of the earlier ones; what was measured."""
    cfg, task = setting.cfg, stream.task.name
    bank_path = cfg.folder.root / "arms" / f"{task}-{arm}"
    shutil.rmtree(bank_path, ignore_errors=True)
    shutil.copytree(earlier, bank_path)
    composition = "none" if arm == "base" else "combination"
    setting = replace(setting, cfg=with_tasks(cfg, (task,), bank_path, composition))
    size = cfg.train.batch_size
    steps = stream.steps
    if arm == "half":
        options = STARTS.options(composition, cfg.bank.composition_options)
        most = math.ceil(options.most_examples(size) / size)
        steps = steps // 2 - most
        rule = f"half of them must hold the {most} of fit and trial"
        check(steps > 0, "run.train.steps", stream.steps, rule, "raise it")
    bank = DeltaBank(bank_path)
    result = learn_task(
        setting, bank, replace(stream, steps=steps), drawn_mask(setting, bank, task), name=arm
    )
    with applied(setting.model, bank.delta(task)):
        loss = test_loss(setting, stream)
    facts = bank.facts(task)["training"].get("composition", {})
    shutil.rmtree(bank_path)
    return {
        "steps": steps,
        "fit_steps": math.ceil(facts.get("examples", 0) / size),
        "batch_size": size,
        "looks": [[look.step, look.loss] for look in result.looks],
        "test_loss": loss,
        "composition": facts,
        "seconds": result.seconds,
    }


def test_loss(setting: Setting, stream: Stream) -> float:
    """Nats per answer token of a task's test examples, under the model as it is."""
    bench, module = setting.bench, setting.model.module
    encoded = bench.modality.encode(stream.task.test, bench.tokenizer, setting.cfg.data)
    with evaluating(module), torch.no_grad():
        step = bench.one_batch([encoded])
        return float(
            accumulate(step, lambda **inputs: module(**inputs), lambda loss: None, setting.model.device)
        )


def run_study(plan: Plan, seeds: list[int], out: Path) -> dict[str, Any]:
    """All trainings that have no record, the result written after each."""
    records: list[dict[str, Any]] = read_json(out)["records"] if out.is_file() else []
    done = {(record["seed"], record["task"], record["arm"]) for record in records}
    prepare_base(plan.cfg, "target")
    for seed in seeds:
        cfg = plan.of_seed(seed)
        wanted = [each for each in plan.learned() if (seed, each[0], each[2]) not in done]
        if not wanted:
            continue
        earlier = earlier_bank(plan, cfg)
        for task, group, arm in wanted:
            setting = Setting.load(replace(cfg, tasks=[each for each in cfg.tasks if each.name == task]))
            about = {"seed": seed, "task": task, "group": group, "arm": arm}
            records.append(about | run_arm(setting, setting.bench.tasks[0], arm, earlier))
            write_json(out, _result(plan, records))
    return _result(plan, records)


def _result(plan: Plan, records: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"earlier": list(plan.earlier), "lr": plan.cfg.train.rate, "density": plan.cfg.mask.density}
    return {
        "run_info": run_info(),
        "meta_info": meta_info(),
        **about,
        "summary": summary(records),
        "records": records,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What composition is worth; writes JSON.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    run_study(Plan.read(given.config), given.seeds, given.out)


if __name__ == "__main__":
    main()
