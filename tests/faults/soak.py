"""A training that meets one random fault after the other is started again each time as a user would, and must end with the bits
of one that met none; and then the next training.

    PYTHONPATH=tests:tests/cli python -m faults.soak --out docs/results/soak.json --hours 1 [--seed 7]

Three ranks on this machine, under each launcher in turn, and two hosts with a rank each where network namespaces are allowed.
What came of each fault is added to the file at once; other pieces of a soak stay in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from faults.jobs import Ended, Job, Setting, Started, prepare
from hosts import namespaces
from hosts.namespaces import Hosts

from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json

STEPS, EVERY = 24, 4
FAULTS_PER_TRAINING = 4
PHASES = ("data", "forward", "backward", "update", "checkpoint")
Template = Callable[[Random, int, int], str]


def _at(kind: str, more: str = "") -> Template:
    """A fault of some rank at some step to come, in some phase."""

    def make(chosen: Random, ranks: int, done: int) -> str:
        phase = chosen.choice(PHASES)
        step = chosen.randint(done + 1, STEPS)
        # there is a checkpoint every so many steps
        step = min(STEPS, step + -step % EVERY) if phase == "checkpoint" else step
        return f"{kind}@rank={chosen.randrange(ranks)},step={step},phase={phase}{more}"

    return make


def _write(kind: str, more: str = "") -> Template:
    def make(chosen: Random, ranks: int, done: int) -> str:
        rank = chosen.randrange(ranks)
        names = [f"rank-{rank:05d}", *(["manifest", ".copy.safetensors"] if rank == 0 else [])]
        return f"{kind}@rank={rank},file={chosen.choice(names)}{more}"

    return make


def _collective(kind: str, time: str) -> Template:
    def make(chosen: Random, ranks: int, done: int) -> str:
        name = chosen.choice(("all_to_all", "any", "sum"))
        return f"{kind}@rank={chosen.randrange(ranks)},step={chosen.randint(done + 1, STEPS)},{name}={time}"

    return make


def _file(kind: str) -> Template:
    return lambda chosen, ranks, done: (
        f"{kind}@file={chosen.choice(('manifest', 'rank-00000', 'rank-00001'))}"
    )


TEMPLATES: dict[str, Template] = {
    **{kind: _at(kind) for kind in ("kill", "term", "usr1", "segv", "exit", "raise", "stop")},
    "pause": _at("stop", ",for=3s"),
    "sleep": _at("sleep", ",for=3s"),
    "clock": _at("clock", ",jump=-1d"),
    "kill while it writes": _write("kill"),
    **{kind: _write(kind) for kind in ("enospc", "edquot", "eio", "erofs", "eacces")},
    "slow": _write("slow", ",for=3s"),
    "delay": _collective("delay", "3s"),
    "lose": _collective("lose", "0s"),
    **{kind: _file(kind) for kind in ("corrupt", "truncate", "empty", "remove")},
}
"""Kind -> a fault of it; NaN and jumps of the loss are left out, since they change the result."""
HOSTS = "2 hosts x 1 rank, torchrun, fsdp2"
OUTSIDE = ("kill all", "suspend all", "kill launcher")
ON_HOSTS = ("link down", "link down for 3 s")


class Soak:
    """One piece.

    Args:
        work: folder for all files.
        seed: of the faults.
        out: the JSON file.
        settings: how the trainings are started, in turn.
    """

    def __init__(self, work: Path, seed: int, out: Path, settings: Sequence[tuple[str, Setting]]) -> None:
        self.work, self.seed, self.out, self.settings = work, seed, out, settings
        self._chosen = Random(seed)
        self._references: dict[Any, bytes] = {}
        self.rounds: list[dict[str, Any]] = read_json(out)["trainings"] if out.is_file() else []
        prepare(work, STEPS, EVERY)

    def run(self, seconds: float) -> bool:
        """Train until the time is over; whether all went well."""
        deadline, number, well = time.monotonic() + seconds, 0, True
        while time.monotonic() < deadline:
            name, setting = self.settings[number % len(self.settings)]
            number += 1
            expected = self._reference(name, setting)
            job, met = Job(self.work, "job", setting), list[dict[str, Any]]()
            while len(met) < FAULTS_PER_TRAINING and time.monotonic() < deadline and job.delta() is None:
                met.append(self._meet(job))
                print(self.seed, number, name, met[-1], flush=True)
            last = job.start("") if job.delta() is None else None
            same = job.delta() == expected
            problems = [each["problem"] for each in met if each["problem"]]
            if last is not None and last.code != 0:
                problems.append(f"undisturbed, it ended with {last.code}: {last.said[-500:]}")
            if not same:
                problems.append("the result has other bits than that of an undisturbed training")
            found = {
                "setting": name,
                "seed": self.seed,
                "faults": met,
                "same_bits": same,
                "problems": problems,
            }
            self.rounds.append(found | run_info())
            print(self.seed, number, name, "same bits" if same else problems, flush=True)
            self.write()
            if problems:
                well = False
                shutil.copy(job.log, self.work / f"failed-{number}.txt")
        return well

    def _meet(self, job: Job) -> dict[str, Any]:
        """Start the command with a fault; what came of it."""
        hosts = job.setting.hosts
        kinds = [*TEMPLATES, *OUTSIDE, *(() if hosts is None else ON_HOSTS)]
        kind = self._chosen.choice(kinds)
        before = len(job.happened())
        text, meanwhile = "", None
        if kind in TEMPLATES:
            text = TEMPLATES[kind](self._chosen, job.setting.ranks, job.last_step())
        else:
            meanwhile = _outside(kind, self._chosen.randint(1, 4), hosts)
        # faults that have happened in this training keep their numbers, so that this one has its own
        ended = job.start(";".join([*job.faults, text]) if text else "", meanwhile)
        if text:
            job.faults.append(text)
        if hosts is not None:
            hosts.link(2, up=True)
        happened = job.happened()[before:]
        found = {"kind": kind, "fault": text or kind, "code": ended.code, "happened": bool(happened)}
        if happened:
            at, step = float(happened[-1]["time"]), int(happened[-1]["step"])
            found |= {
                "seconds": round(ended.ended_at - at, 1),
                "steps_lost": max(0, step - 1 - job.checkpoint()),
            }
        return found | {"came": _came(ended), "problem": _problem(ended)}

    def _reference(self, name: str, setting: Setting) -> bytes:
        key = setting.kind
        if key not in self._references:
            job = Job(self.work, "reference", setting)
            ended = job.start()
            made = job.delta()
            if ended.code != 0 or made is None:
                raise RuntimeError(f"{name}: the undisturbed training failed: {ended.said[-2000:]}")
            self._references[key] = made
        return self._references[key]

    def write(self) -> None:
        """All trainings so far, and what they say together."""
        faults = [each for found in self.rounds for each in found["faults"] if each["happened"]]
        kinds = {}
        for kind in sorted({each["kind"] for each in faults}):
            own = [each for each in faults if each["kind"] == kind]
            kinds[kind] = {
                **{
                    came: sum(each["came"] == came for each in own)
                    for came in ("recovered", "refused", "went on")
                },
                "median_seconds": median(each["seconds"] for each in own),
                "most_seconds": max(each["seconds"] for each in own),
                "most_steps_lost": max(each["steps_lost"] for each in own),
            }
        write_json(
            self.out,
            {
                "meta_info": meta_info(),
                "steps": STEPS,
                "checkpoint_every": EVERY,
                "faults": len(faults),
                "kinds": kinds,
                "same_bits": sum(found["same_bits"] for found in self.rounds),
                "problems": sum(len(found["problems"]) for found in self.rounds),
                "trainings": self.rounds,
            },
        )


def _came(ended: Ended) -> str:
    return {0: "went on", 2: "refused"}.get(ended.code if ended.code is not None else -1, "recovered")


def _problem(ended: Ended) -> str:
    if ended.code is None:
        return f"it hung: {ended.said[-500:]}"
    if ended.left:
        return f"processes were left: {ended.left}"
    if ended.code == 2 and len(ended.errors()) != 1:
        return f"{len(ended.errors())} lines explain a refusal"
    return ""


def _outside(kind: str, step: int, hosts: Hosts | None) -> Callable[[Job, Started], None]:
    """A fault from outside, so many steps after the start."""
    begun = list[int]()

    def meanwhile(job: Job, process: Started) -> None:
        if not begun:
            begun.append(job.last_step())
        if len(begun) == 1 and job.last_step() >= begun[0] + step:
            begun.append(0)
            job.note(kind, job.last_step())
            _happen(kind, job, process, hosts)

    return meanwhile


def _happen(kind: str, job: Job, process: Started, hosts: Hosts | None) -> None:
    def tell(number: int, ranks: bool = True) -> None:
        for pid in job.processes(process):
            if ranks or not job.is_rank(pid):
                os.kill(pid, number)

    if kind == "kill all":
        tell(signal.SIGKILL)
    elif kind == "kill launcher":
        tell(signal.SIGKILL, ranks=False)
    elif kind == "suspend all":
        tell(signal.SIGSTOP)
        job.after(6.0, lambda: tell(signal.SIGCONT))
    elif hosts is not None:
        hosts.link(2, up=False)
        if kind != "link down":
            job.after(3.0, lambda: hosts.link(2, up=True))


def settings(stack: ExitStack, only: str) -> list[tuple[str, Setting]]:
    """How trainings are started here."""
    found = [
        (f"1 host x 3 ranks, {launcher}, {backend}", Setting(launcher, 3, backend))
        for launcher, backend in (("torchrun", "fsdp2"), ("deepspeed", "zero3"), ("accelerate", "fsdp2"))
    ]
    reason = namespaces.forbidden()
    if reason is not None:
        print(f"no hosts: {reason}", flush=True)
    elif only in HOSTS:
        two = stack.enter_context(namespaces.hosts(2))
        found.insert(1, (HOSTS, Setting("torchrun", 2, "fsdp2", hosts=two)))
    return [each for each in found if only in each[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, to which this piece is added")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, help="instead of hours")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the faults")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--work", type=Path, help="folder for all files; a temporary one when left out")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="td-soak-"))
    work.mkdir(parents=True, exist_ok=True)
    seconds = 60 * arguments.minutes if arguments.minutes is not None else 3600 * arguments.hours
    with ExitStack() as stack:
        soak = Soak(work, arguments.seed, arguments.out, settings(stack, arguments.only))
        well = soak.run(seconds)
    if well and arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
