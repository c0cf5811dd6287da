"""What the records of a study say: cells, paired differences, rates, costs. The page's claims are read from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import numpy as np

from trace_dist.studies.plan import StudyConfig
from trace_dist.studies.rates import fitted_product, is_bracketed, product, tried_in
from trace_dist.studies.records import Cell, Records, Trial
from trace_dist.studies.statistics import Answers, Estimate, difference, share_of_gain

LIKE_TRACE = "probed_like_trace"
"""Entries with the memory of TRACE's whole tensors."""
PROJECTED = ("projected", "projected_magnitude", "identity", "align", "budgets", "places")
"""Arms whose share of the gain of probing on the target is asked for."""
MARGIN = 0.02
"""Nats per answer token by which a smaller density may be worse and still be enough."""
PROBED = ("probed", "narrowed")
"""Arms that probe the target, with which those are compared."""


def summarise(records: Records, study: StudyConfig, tasks: Sequence[str]) -> dict[str, Any]:
    """All that is shown of a study; JSON-ready."""
    product_used, cells_used = fitted_product(records, tasks, study.rule)
    return {
        "trainings": records.num_trials,
        "hours": records.seconds / 3600,
        "bases": {task: _base(records, task) for task in tasks if task in records.bases},
        "cells": [_cell(records, cell) for cell in _ordered(records, study, tasks)],
        "differences": list(_differences(records, study, tasks)),
        "shares": list(_shares(records, study, tasks)),
        "rule": {
            "product": product_used,
            "cells": cells_used,
            "checked": list(_checked(records, tasks, product_used)),
        },
        "costs": list(_costs(records, study)),
        "enough": list(_enough(records, study, tasks)),
    }


def answers(records: Records, cell: Cell) -> Answers | None:
    """What a cell's best rate says to the test examples; None where nothing is known, or the base's record was lost."""
    trials, base = [trial for _, trial in _best(records, cell)], records.bases.get(cell.task)
    if not trials or base is None:
        return None
    tokens = base["tokens"]
    return Answers(np.array([trial.losses for trial in trials], float), np.array(tokens, float))


def is_undecided(records: Records, cell: Cell, reference: str) -> bool:
    """Whether it is open if a cell is better or worse than the reference; of one without a density it always is."""
    if cell.density is None:
        return True
    ours, theirs = answers(records, cell), answers(records, cell._replace(arm=reference))
    if ours is None or theirs is None:
        return False
    return difference([(ours, theirs)]).verdict == "undecided"


def _best(records: Records, cell: Cell) -> Iterator[tuple[int, Trial]]:
    """The best trial of each seed."""
    for seed in sorted(records.trials.get(cell, {})):
        best = records.best(cell, seed)
        if best is not None:
            yield seed, best


def _is_settled(records: Records, cell: Cell) -> bool:
    """Whether its rate is tuned and no seed diverged at it: the answers of those that are left would be too good."""
    seeds = records.trials.get(cell, {})
    return is_bracketed(tried_in(records, cell)) and all(records.best(cell, seed) for seed in seeds)


def _ordered(records: Records, study: StudyConfig, tasks: Sequence[str]) -> list[Cell]:
    """All cells with a trial: by task, density and arm."""
    arms = study.arms
    known = [cell for cell in records.trials if cell.task in tasks and cell.arm in arms]
    return sorted(known, key=lambda cell: (tasks.index(cell.task), cell.density or 0.0, arms.index(cell.arm)))


def _base(records: Records, task: str) -> dict[str, Any]:
    base = records.bases[task]
    return {
        "loss": sum(base["losses"]) / sum(base["tokens"]),
        "accuracy": 100 * sum(base["right"]) / len(base["right"]),
        "text": base["text"],
        "examples": len(base["tokens"]),
        "majority_percent": base["majority_percent"],
        "overlap_percent": base["overlap_percent"],
    }


def _cell(records: Records, cell: Cell) -> dict[str, Any]:
    tried = tried_in(records, cell)
    found: dict[str, Any] = {
        **cell._asdict(),
        "rates": [
            {"lr": lr, "validation": loss if math.isfinite(loss) else None}
            for lr, loss in sorted(tried.items())
        ],
        "bracketed": _is_settled(records, cell),
        "seeds": 0,
    }
    trials = [trial for _, trial in _best(records, cell)]
    mine = answers(records, cell)
    if mine is None:
        return found
    text = records.bases[cell.task]["text"]
    return found | {
        "seeds": len(trials),
        "lr": trials[0].lr,
        "entries": trials[0].entries,
        "product": product(records, cell, trials[0].lr),
        "loss": mine.loss,
        "loss_by_seed": [sum(trial.losses or ()) / float(mine.tokens.sum()) for trial in trials],
        "accuracy": 100 * float(np.mean([np.mean(trial.right or ()) for trial in trials])),
        "text_rise": float(np.mean([trial.text for trial in trials if trial.text is not None])) - text,
    }


def _differences(records: Records, study: StudyConfig, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every arm beside the reference at its density and at ten times the entries, and beside the arms without a density."""
    for arm in study.arms:
        for density in study.densities:
            mine = (arm, density)
            others = [(study.reference, density), (study.reference, _tenfold(study, density))]
            others += [(name, None) for name in ("lora", "full", "trace") if name in study.arms]
            for other in others:
                if other != mine and not (other[0] == study.reference and other[1] is None):
                    yield from _difference(records, mine, other, tasks)
    if LIKE_TRACE in study.arms:
        yield from _difference(records, (LIKE_TRACE, None), ("trace", None), tasks)


def _tenfold(study: StudyConfig, density: float) -> float | None:
    return next((each for each in study.densities if math.isclose(each, 10 * density)), None)


def _difference(
    records: Records, mine: tuple[str, float | None], other: tuple[str, float | None], tasks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Two cells on every task where both are known, and on average over those."""
    pairs, rows = [], []
    for task in tasks:
        cells = Cell(mine[0], task, mine[1]), Cell(other[0], task, other[1])
        ours, theirs = (answers(records, cell) for cell in cells)
        if ours is None or theirs is None:
            continue
        found = difference([(ours, theirs)])
        tuned = all(_is_settled(records, cell) for cell in cells)
        rows.append(
            {
                "task": task,
                **found.to_json(),
                "verdict": found.verdict if tuned else "undecided",
                "tuned": tuned,
                "seeds": min(len(ours.nats), len(theirs.nats)),
            }
        )
        if tuned:
            pairs.append((ours, theirs))
    if rows:
        mean: Estimate | None = difference(pairs) if pairs else None
        yield {
            "arm": mine[0],
            "density": mine[1],
            "other": other[0],
            "other_density": other[1],
            "tasks": rows,
            "mean": None
            if mean is None
            else {**mean.to_json(), "verdict": mean.verdict, "tasks": len(pairs)},
        }


def _shares(records: Records, study: StudyConfig, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Share of the gain of probing the target that a projected mask keeps."""
    for density in study.densities:
        for best in (name for name in PROBED if name != study.reference):
            for arm in PROJECTED:
                triples, used = [], []
                for task in tasks:
                    cells = [Cell(name, task, density) for name in (study.reference, best, arm)]
                    three = [answers(records, cell) for cell in cells]
                    tuned = all(_is_settled(records, cell) for cell in cells)
                    if tuned and three[0] is not None and three[1] is not None and three[2] is not None:
                        triples.append((three[0], three[1], three[2]))
                        used.append(task)
                if triples:
                    gain = difference([(reference, probed) for reference, probed, _ in triples])
                    yield {
                        "arm": arm,
                        "of": best,
                        "density": density,
                        "tasks": used,
                        "gain": {**gain.to_json(), "verdict": gain.verdict},
                        "share": share_of_gain(triples).to_json(),
                    }


def _enough(records: Records, study: StudyConfig, tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Per arm and task, the smallest density whose loss lies within ``MARGIN`` of that of the best density, beyond doubt."""
    for arm in study.arms:
        for task in tasks:
            known = {
                density: found
                for density in study.densities
                if (found := answers(records, Cell(arm, task, density))) is not None
                and _is_settled(records, Cell(arm, task, density))
            }
            if len(known) == len(study.densities) > 1:
                best = min(known.values(), key=lambda found: found.loss)
                # the best one is, however much its seeds differ
                near = [d for d, mine in known.items() if mine is best or _is_near(mine, best)]
                yield {"arm": arm, "task": task, "density": min(near), "margin": MARGIN}


def _is_near(mine: Answers, best: Answers) -> bool:
    return difference([(mine, best)]).high <= MARGIN


def _checked(records: Records, tasks: Sequence[str], fitted: float) -> Iterator[dict[str, Any]]:
    """The product at the best rate of every tuned cell, over the fitted one."""
    for cell in records.trials:
        best = records.best(cell)
        if best is None or not is_bracketed(tried_in(records, cell)) or cell.task not in tasks:
            continue
        found = product(records, cell, best.lr)
        if found:
            yield {**cell._asdict(), "lr": best.lr, "product": found, "over_fitted": found / fitted}


def _costs(records: Records, study: StudyConfig) -> Iterator[dict[str, Any]]:
    """Median cost of making an arm's masks, alone and over that of one training on them."""
    for arm in study.arms:
        made = [record for (name, _, _), record in records.masks.items() if name == arm]
        trials = [
            trial
            for cell, seeds in records.trials.items()
            for each in seeds.values()
            for trial in each
            if cell.arm == arm
        ]
        if not made or not trials:
            continue
        warm = [record["warm_losses"] for record in made if record["warm_losses"]]
        probe_flops, probe_s = (median(record[key] for record in made) for key in ("probe_flops", "probe_s"))
        train_flops, train_s = median(t.train_flops for t in trials), median(t.train_s for t in trials)
        yield {
            "arm": arm,
            "learning": [each for record in made if (each := record.get("learning")) is not None],
            "warm_losses": [[round(loss, 3) for loss in each] for each in warm],
            "probe_flops": probe_flops,
            "probe_s": probe_s,
            "train_flops": train_flops,
            "train_s": train_s,
            "flops_share": probe_flops / train_flops,
            "time_share": probe_s / train_s,
        }
