"""What TRACE claims of probed and projected masks, and what a study says for or against it; read from its summary.

A claim holds where the interval of the mean over at least three tasks lies on its side of zero, fails where it lies on the other
side, and is undecided else, or where the study has not come so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]
FOR, AGAINST, UNDECIDED = "for", "against", "undecided"
PROBED = ("probed", "narrowed")
SPREAD = ("probed_evenly", "probed_floored")
"""Ways of ``probed`` that are looked at where a study has them."""
KEPT = 0.8
"""Share of the gain that a projected mask should keep."""
FEWEST = 3
"""Tasks on which a claim must have been looked at."""
CHEAP = 0.05
"""Share of a training's operations that a probe should cost at most."""


@dataclass(frozen=True)
class Claim:
    """A claim with its evidence.

    Attributes:
        text: what is claimed.
        verdict: for, against or undecided.
        evidence: numbers.
    """

    text: str
    verdict: str
    evidence: str


def claims(result: Result) -> list[Claim]:
    """All claims."""
    return [claim for rule in RULES for claim in rule(result)]


def nats(found: Result) -> str:
    """A difference with its interval."""
    return f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def percent(density: float | None) -> str:
    """A density."""
    return "own" if density is None else f"{100 * density:g} %"


def _label(result: Result, arm: str) -> str:
    label: str = result["arms"][arm]["label"] if arm in result["arms"] else arm
    return label


def _find(result: Result, **wanted: Any) -> Result | None:
    rows = (row for row in result["differences"] if all(row[key] == value for key, value in wanted.items()))
    return next(rows, None)


def _verdict(found: Result | None, good: str, bad: str) -> str:
    mean = None if found is None else found["mean"]
    if mean is None or mean["tasks"] < FEWEST:
        return UNDECIDED
    return FOR if mean["verdict"] == good else AGAINST if mean["verdict"] == bad else UNDECIDED


def _counted(found: Result | None) -> str:
    """How many tasks say what, and the mean."""
    if found is None:
        return "not measured"
    verdicts = [row["verdict"] for row in found["tasks"]]
    counts = f"lower loss on {verdicts.count('lower')}, higher on {verdicts.count('higher')}, of {len(verdicts)} task(s)"
    mean = found["mean"]
    return counts if mean is None else f"{counts}; mean difference {nats(mean)} nats"


def _beats_random(result: Result) -> Iterator[Claim]:
    for density in result["settings"]["densities"]:
        for arm in (each for each in (*PROBED, *SPREAD) if each in result["arms"]):
            found = _find(result, arm=arm, density=density, other="random", other_density=density)
            if found is None and arm in SPREAD:
                continue
            text = f"{_label(result, arm)} beats random at {percent(density)}"
            yield Claim(text, _verdict(found, "lower", "higher"), _counted(found))


def _tenfold(result: Result) -> Iterator[Claim]:
    for row in result["differences"]:
        more = row["other_density"]
        if row["arm"] in PROBED and row["other"] == "random" and more is not None and more > row["density"]:
            text = (
                f"{_label(result, row['arm'])} at {percent(row['density'])} beats random at {percent(more)}"
            )
            yield Claim(text, _verdict(row, "lower", "higher"), _counted(row))


def _beside(other: str) -> Callable[[Result], Iterator[Claim]]:
    def rule(result: Result) -> Iterator[Claim]:
        for density in result["settings"]["densities"]:
            for arm in (each for each in PROBED if each in result["arms"]):
                found = _find(result, arm=arm, density=density, other=other)
                if found is not None:
                    text = f"{_label(result, arm)} at {percent(density)} has a lower loss than {_label(result, other)}"
                    yield Claim(text, _verdict(found, "lower", "higher"), _counted(found))

    return rule


def _at_equal_memory(result: Result) -> Iterator[Claim]:
    found = _find(result, arm="probed_like_trace", other="trace")
    if found is not None:
        text = f"{_label(result, found['arm'])}, has a lower loss than {_label(result, 'trace')}"
        yield Claim(text, _verdict(found, "lower", "higher"), _counted(found))


def _kept(result: Result) -> Iterator[Claim]:
    for row in result["shares"]:
        share, gain = row["share"], row["gain"]
        text = (
            f"{_label(result, row['arm'])} keeps {KEPT:.0%} of the gain of {_label(result, row['of'])} "
            f"at {percent(row['density'])}"
        )
        if gain["verdict"] != "higher":
            evidence = (
                f"there is no gain beyond doubt to keep: {nats(gain)} nats on {len(row['tasks'])} tasks"
            )
            yield Claim(text, UNDECIDED, evidence)
            continue
        verdict = FOR if share["low"] >= KEPT else AGAINST if share["high"] < KEPT else UNDECIDED
        verdict = verdict if len(row["tasks"]) >= FEWEST else UNDECIDED
        numbers = (
            f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%}) on {len(row['tasks'])} tasks"
        )
        yield Claim(text, verdict, numbers)


def _cheap(result: Result) -> Iterator[Claim]:
    for row in result["costs"]:
        if row["probe_flops"] > 0:
            text = f"making masks of {_label(result, row['arm'])} costs at most {CHEAP:.0%} of the training that they guide"
            share = row["flops_share"]
            evidence = (
                f"{share:.0%} of the operations, {row['time_share']:.0%} of the time, of one training here"
            )
            yield Claim(text, FOR if share <= CHEAP else AGAINST, evidence)


RULES: tuple[Callable[[Result], Iterator[Claim]], ...] = (
    _beats_random,
    _tenfold,
    _beside("lora"),
    _beside("full"),
    _beside("trace"),
    _at_equal_memory,
    _kept,
    _cheap,
)
