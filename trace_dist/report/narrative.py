"""What a run did, in sentences made from its numbers alone: what was not measured is not said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trace_dist.report.results import RunView, mapping, mean, number
from trace_dist.report.tables import count, duration, final_average, fixed, percent, rate, share, shorten_all


def narrate(view: RunView) -> list[str]:
    """Paragraphs of plain text: what was done and came out, what ran beside it, what it cost. The caller escapes them."""
    parts = [
        [*_setting(view), *_outcome(view)],
        [*_others(view), *chosen_density(view), *chosen_rates(view)],
        _cost(view),
    ]
    return [" ".join(sentences) for sentences in parts if sentences]


def join(names: Sequence[str]) -> str:
    """`a, b and c`; a long list and long names are cut."""
    names = shorten_all(names, 24)
    if len(names) > 6:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _setting(view: RunView) -> list[str]:
    hero, run_info = view.hero, view.part("run_info")
    several = len(view.tasks) > 1
    learned = f"{len(view.tasks)} tasks were learned one after another" if several else "One task was learned"
    out = [f"{learned}: {join(view.tasks)}."]
    if view.masks.get("proxy") and view.masks.get("target"):
        out.append("A small proxy was probed for each task, and its masks were projected onto the target.")
    if missed := _not_learned(view):
        its = "its mask shows" if len(missed) == 1 else "their masks show"
        out.append(f"The probe has not learned {join(missed)}: {its} nothing.")
    density = hero.stat("density")
    if not math.isnan(density):
        trainable = hero.stat("trainable")
        entries = "" if math.isnan(trainable) else f" ({count(trainable)} entries per task)"
        out.append(f"Training touched {share(density)} of the maskable weights{entries}{_where(run_info)}.")
    return out


def _not_learned(view: RunView) -> list[str]:
    """Tasks whose loss after the probe is not below chance by the run's margin."""
    margin = number(mapping(view.part("config").get("probe")).get("margin"))
    found = {task: mapping(each) for task, each in mapping(view.part("specificity").get("learning")).items()}
    return [
        str(task)
        for task, each in found.items()
        if number(each.get("after")) > (1 - margin) * number(each.get("chance"))
    ]


def _where(run_info: Mapping[str, Any]) -> str:
    ranks = number(run_info.get("num_ranks"))
    backend, launcher = run_info.get("backend"), run_info.get("launcher")
    if ranks == 1 and launcher == "none":
        return " in one process"
    text = "" if math.isnan(ranks) else f" on {ranks:.0f} {'rank' if ranks == 1 else 'ranks'}"
    text += f" of {backend}" if backend and text else ""
    return text + (f", started by {launcher}" if launcher and text else "")


def _outcome(view: RunView) -> list[str]:
    hero = view.hero
    out = []
    before, after, forgotten = mean(hero.just_trained), final_average(hero), hero.stat("forgetting")
    if not math.isnan(before) and len(view.tasks) > 1:
        out.append(f"Right after its own training a task scores {percent(before)} on average.")
    if not math.isnan(after):
        lost = "" if math.isnan(forgotten) else f", having forgotten {fixed(forgotten)} points"
        out.append(f"At the end the {hero.label} method scores {percent(after)} over all tasks{lost}.")
    accuracy, bound = (number(view.part("retrieval").get(key)) for key in ("accuracy", "error_bound"))
    if not math.isnan(accuracy):
        limit = (
            ""
            if math.isnan(bound)
            else f"; at most {percent(bound)} go to another one (95\N{NO-BREAK SPACE}% limit)"
        )
        out.append(f"The nearest cluster finds the right task for {percent(accuracy)} of the prompts{limit}.")
    return out


def _others(view: RunView) -> list[str]:
    parts = []
    for method in view.methods:
        if method is view.hero or math.isnan(final_average(method)):
            continue
        before, after = mean(method.just_trained), percent(final_average(method))
        both = len(view.tasks) > 1 and not math.isnan(before)
        parts.append(f"{method.label} {f'{percent(before)} and {after}' if both else after}")
    when = ", just trained and at the end" if len(view.tasks) > 1 else ""
    return [f"Run beside it{when}: {'; '.join(parts)}."] if parts else []


def chosen_rates(view: RunView) -> list[str]:
    """How the learning rates were chosen; nothing where the results do not say which they were."""
    known = [method for method in view.methods if not math.isnan(method.stat("lr"))]
    raced, given = [m for m in known if m.rates], [m for m in known if not m.rates]
    out = []
    if raced:
        counts = sorted({len(method.rates) for method in raced})
        several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        race = mapping(view.part("config").get("race"))
        steps = number(race.get("steps"))
        raced_on = min(number(race.get("tasks", 1)), len(view.tasks))
        which = "the first task" if raced_on <= 1 else f"the first {raced_on:.0f} tasks"
        each = " each" if raced_on > 1 else ""
        long = "" if math.isnan(steps) else f" for {steps:.0f} steps{each}"
        validated = number(mapping(view.part("config").get("train")).get("eval_every")) > 0
        examples = "validation examples" if validated else "held-out training examples"
        whose = (
            "Every learning rate" if not given else f"The learning rate of {join([m.label for m in raced])}"
        )
        out.append(
            f"{whose} won a race of {several} rates, each of which trained {which}{long}, by the loss on "
            f"{examples}."
        )
    if given:
        whose = "The learning rates" if not raced else f"That of {join([m.label for m in given])}"
        out.append(f"{whose} {'were' if not raced else 'was'} given, not tuned.")
    return out


def chosen_density(view: RunView) -> list[str]:
    """Which densities were tried, where the run raced for one."""
    part = view.part("density")
    found = part.get("tried")
    tried = [mapping(each) for each in found] if isinstance(found, list) else []
    if not tried:
        return []
    shown = [
        f"{share(number(each.get('density')))}: {fixed(number(each.get('loss')), 3)}, "
        f"rate {rate(number(each.get('lr')))}"
        for each in tried
    ]
    return [
        f"The density {share(number(part.get('density')))} is the smallest of {len(tried)} whose held-out loss in a "
        f"short race lies within {fixed(number(part.get('margin')), 2)} nats of the best ({'; '.join(shown)})."
    ]


def _cost(view: RunView) -> list[str]:
    out = []
    ours, full = view.bytes_per_param(view.hero.name), view.bytes_per_param("full")
    if not math.isnan(ours):
        against = (
            f", {full / ours:.1f} times less than the {fixed(full)} of full AdamW" if full > ours > 0 else ""
        )
        out.append(f"Model states take {fixed(ours, 2)} bytes per parameter{against}.")
    seconds = number(view.part("run_info").get("seconds"))
    if not math.isnan(seconds):
        out.append(f"The whole run took {duration(seconds)}.")
    return out
