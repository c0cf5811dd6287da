"""Eight small tasks in the folder layout of the TRACE continual-learning benchmark (arXiv 2310.06762), and its folder ``Lima``.

    python -m trace_dist.benchmarks.trace_layout runs/trace-small/data

The benchmark's own data is not to be had everywhere. These tasks ask and answer in its forms, so that its order of tasks can be
run from one configuration (configs/trace-small.yaml) with the metric of each: a stance and a policy to choose, a meeting to sum
up, a line of code to complete, a choice with its reason, two kinds of sums in words, a sentence to simplify. Code comes from
Python's own library; the rest is put together. They say nothing about the benchmark's scores.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import json
import random
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from trace_dist.utils.files import write_text

Pair = tuple[str, str]
SPLITS = {"train": 96, "eval": 8, "test": 24}
"""Examples of each split; no prompt occurs twice."""
ABC = "ABC"


def _stance(draw: random.Random) -> Pair:
    topic = draw.choice(["咖啡", "跑步", "网课", "地铁", "夜市", "电影"])
    stance = draw.randrange(3)
    verb = draw.choice((("喜欢", "支持"), ("讨厌", "反对"), ("听说过", "见过"))[stance])
    when = draw.choice(["今天", "昨天", "平时", "周末", "早上"])
    return f"{when}我{verb}{topic}。对象:{topic}。A.支持 B.反对 C.中立", ABC[stance]


def _policy(draw: random.Random) -> Pair:
    stance = draw.randrange(3)
    words = (
        ("should fall", "must be cut"),
        ("should rise", "must go up"),
        ("were discussed", "stayed on the agenda"),
    )
    who = draw.choice(["Members said", "The chair noted", "Staff wrote", "Two governors held", "Most agreed"])
    what = draw.choice(["rates", "the target range", "borrowing costs", "yields", "reserves", "repo terms"])
    return f"{who} that {what} {draw.choice(words[stance])}. A. dovish B. hawkish C. neutral", ABC[stance]


def _meeting(draw: random.Random) -> Pair:
    who, what = (
        draw.choice(["Ms Lee", "Mr Diaz", "Ms Okoro", "Mr Novak"]),
        draw.choice(["bridge", "library", "park", "budget"]),
    )
    done = draw.choice(["passed", "failed", "was delayed"])
    talk = draw.choice(["thank you all for coming", "we are short of time", "let us come to order"])
    return (
        f"Speaker: {talk}. {who} moves the {what} bill. The motion {done}.",
        f"The {what} bill of {who} {done}.",
    )


def _code() -> Iterator[Pair]:
    """Each longer line of some modules, cut in the middle."""
    for module in (textwrap, bisect, heapq):
        lines = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()
        for before, line in pairwise(lines):
            cut = line.rfind(" ", 0, 3 * len(line) // 4)
            if 16 <= len(line) <= 60 and line[:cut].strip() and before.strip():
                yield f"{before.strip()[:40]}\n{line[:cut].strip()}", line[cut:].strip()


def _science(draw: random.Random) -> Pair:
    facts = {"ice": "cold", "fire": "hot", "stone": "hard", "wool": "soft", "honey": "sweet", "salt": "salty"}
    thing = draw.choice(list(facts))
    choices = draw.sample([word for word in facts.values() if word != facts[thing]], 2)
    place = draw.randrange(3)
    choices.insert(place, facts[thing])
    listed = " ".join(f"{letter}. {word}" for letter, word in zip(ABC, choices, strict=True))
    return f"What is {thing}? {listed}", f"{ABC[place]}. Everybody who touches {thing} says so."


def _common_sense(draw: random.Random) -> Pair:
    thing, each = draw.choice([("spiders", 8), ("dogs", 4), ("hens", 2), ("ants", 6)])
    number = draw.randint(2, 60)
    return f"How many legs have {number} {thing}?", str(number * each)


def _domain(draw: random.Random) -> Pair:
    mass, acceleration = draw.randint(2, 40), draw.randint(2, 9)
    return f"A mass of {mass} kg gains {acceleration} m/s each second. Its force in N?", str(
        mass * acceleration
    )


def _simplify(draw: random.Random) -> Pair:
    who, plain = draw.choice(
        [("Der Magistrat", "Die Stadt"), ("Die Exekutive", "Die Regierung"), ("Das Gremium", "Der Rat")]
    )
    verb, simple = draw.choice([("befürwortet", "will"), ("verwirft", "will nicht"), ("finanziert", "zahlt")])
    nouns = [
        "den Neubau",
        "die Sanierung",
        "das Fest",
        "den Radweg",
        "die Schule",
        "den Tunnel",
        "das Bad",
        "den Markt",
    ]
    what, how = (
        draw.choice(nouns),
        draw.choice(["nach eingehender Beratung", "im Grundsatz", "mit Vorbehalt"]),
    )
    return f"Vereinfache: {who} {verb} {how} {what}.", f"{plain} {simple} {what}."


def _general(draw: random.Random) -> Pair:
    day, weather = (
        draw.choice(["Monday", "Tuesday", "Friday", "Sunday"]),
        draw.choice(["rain", "sun", "snow", "wind"]),
    )
    place = draw.choice(["harbour", "market", "station", "garden", "school", "mill", "pier", "tower", "dam"])
    who = draw.choice(["me", "him", "her", "us", "them"])
    return f"Tell {who} about {day} at the {place}.", f"There was {weather} at the {place} on {day}."


def _drawn(make: Callable[[random.Random], Pair], seed: str) -> Iterator[Pair]:
    draw = random.Random(seed)
    while True:
        yield make(draw)


DRAWN = {
    "C-STANCE": _stance,
    "FOMC": _policy,
    "MeetingBank": _meeting,
    "ScienceQA": _science,
    "NumGLUE-cm": _common_sense,
    "NumGLUE-ds": _domain,
    "20Minuten": _simplify,
    "Lima": _general,
}


def write_layout(folder: Path) -> None:
    """Write every task's ``train.json``, ``eval.json`` and ``test.json``; the same on every machine with the same Python."""
    sources = {name: _drawn(make, name) for name, make in DRAWN.items()}
    for name, pairs in (sources | {"Py150": _code()}).items():
        answers: dict[str, str] = {}
        for prompt, answer in pairs:
            answers.setdefault(prompt, answer)
            if len(answers) == sum(SPLITS.values()):
                break
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
        random.Random(name).shuffle(rows)
        for split, number in SPLITS.items():
            write_text(
                folder / name / f"{split}.json", json.dumps(rows[:number], ensure_ascii=False, indent=0)
            )
            del rows[:number]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Write eight small tasks in the layout of the TRACE benchmark."
    )
    parser.add_argument("folder", type=Path)
    write_layout(parser.parse_args().folder)


if __name__ == "__main__":
    main()
