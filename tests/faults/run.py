"""Let every fault of the table happen in a small training, and keep what came of it.

    PYTHONPATH=tests:tests/cli python -m faults.run --out docs/results/faults.json [--only TEXT] [--minutes 14]

Cases that the file has for the present commit are not run again; ``--again`` runs them all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.cases import CASES, OUTSIDE, Case
from faults.cgroup import limited
from faults.jobs import Ended, Job, Setting, prepare

from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json

STEPS = 12
CGROUP_MIB = 3000


class Bench:
    """Runs cases on trainings of a few steps.

    Args:
        work: folder for all files.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        prepare(work, STEPS)
        self._references: dict[Any, bytes] = {}

    def reference(self, setting: Setting) -> bytes:
        """What an undisturbed training makes; one for all settings that must have the same bits."""
        if setting.kind not in self._references:
            own = Setting(ranks=setting.ranks, backend=setting.backend, options=setting.options)
            job = Job(self.work, "reference", own)
            ended = job.start()
            made = job.delta()
            if ended.code != 0 or made is None:
                raise RuntimeError(f"the undisturbed training failed: {ended.said[-2000:]}")
            self._references[setting.kind] = made
        return self._references[setting.kind]

    def run(self, case: Case) -> dict[str, Any]:
        """What came of a case: ``failures`` says what should not have."""
        with ExitStack() as stack:
            setting = case.setting
            if setting.around == ("cgroup",):
                around = stack.enter_context(limited(CGROUP_MIB))
                if isinstance(around, str):
                    return {"skipped": around, "failures": []}
                setting = replace(setting, around=around)
            expected = self.reference(setting)
            job = Job(self.work, "job", setting)
            found = _check(case, job, expected)
        if found["failures"]:
            shutil.copy(job.log, self.work / f"failed-{re.sub('[^a-z0-9]+', '-', case.name)}.txt")
        return found


def _check(case: Case, job: Job, expected: bytes) -> dict[str, Any]:
    failures: list[str] = []

    def must(holds: bool, what: str) -> None:
        if not holds:
            failures.append(what)

    outside = OUTSIDE.get(case.name)
    ended = [job.start(case.faults, None if outside is None else outside())]
    if case.later:
        must(ended[0].code not in (0, None), f"the first start ended with {ended[0].code}")
        ended.append(job.start(case.faults))
    shown, notes = ended[-1], job.happened()
    must(bool(notes), "the fault did not happen")
    at = max((float(note["time"]) for note in notes), default=0.0)
    seconds = shown.ended_at - at
    must(not any(each.left for each in ended), f"processes were left: {[each.left for each in ended]}")
    must(re.search(case.says, shown.said) is not None, f"{case.says!r} was not said")
    must(seconds <= case.seconds, f"{seconds:.0f} s from the fault to the end")
    found: dict[str, Any] = {"faults": case.faults or case.name, "outcome": case.outcome, "code": shown.code}
    found |= {"said": _line(case, shown), "seconds": round(seconds, 1), "happened": len(notes)}
    if case.outcome in ("goes on", "skips", "goes back"):
        must(shown.code == 0, f"ended with {shown.code}")
        must((job.delta() == expected) == (case.outcome == "goes on"), "the bits of the result")
    elif case.outcome == "refused" or not case.later:
        found |= _again(case, job, shown, expected, must)
    else:
        must(shown.code == 0, f"ended with {shown.code}")
        must(job.delta() == expected, "the bits of the result")
        found |= _lost(case, ended[0], shown, notes, must)
    return found | {"failures": failures}


def _again(case: Case, job: Job, shown: Ended, expected: bytes, must: Any) -> dict[str, Any]:
    """Start the same command again, as a user would; after a refusal, with what it complained of mended."""
    if case.outcome == "refused":
        must(shown.code == 2, f"ended with {shown.code}")
        must(len(shown.errors()) == 1, f"{len(shown.errors())} lines explain it")
    else:
        must(shown.code not in (0, None), f"ended with {shown.code}")
    shutil.copy(job.work / "mask.safetensors", job.mask)
    notes, kept = job.happened(), job.checkpoint()
    again = job.start("")
    must(again.code == 0, f"the same command again ended with {again.code}: {again.said[-500:]}")
    must((job.delta() == expected) == case.same, "the bits of the result")
    must(again.continued == kept, f"it went on after step {again.continued}, but step {kept} was kept")
    return _lost(case, shown, again, notes, must)


def _lost(case: Case, shown: Ended, again: Ended, notes: Any, must: Any) -> dict[str, Any]:
    step = max((int(note["step"]) for note in notes), default=0)
    lost = max(0, step - 1 - again.continued) if shown.code != 2 or step else 0
    must(lost <= case.lost, f"{lost} steps had to be done again")
    going = None if again.going_at is None else round(again.seconds - (again.ended_at - again.going_at), 1)
    return {"continued_after": again.continued, "steps_lost": lost, "seconds_of_the_restart": going}


def _line(case: Case, shown: Ended) -> str:
    """What was said of it."""
    if not case.says:
        return ""
    line = next((line for line in shown.said.splitlines() if re.search(case.says, line)), "")
    return re.sub(r"^\d\d:\d\d:\d\d ", "", line)[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, from 0")
    parser.add_argument(
        "--last", type=int, default=len(CASES), help="number of the case before which it ends"
    )
    parser.add_argument("--again", action="store_true", help="those too that the file has")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after this many")
    parser.add_argument("--work", type=Path, help="folder for all files; a temporary one when left out")
    arguments = parser.parse_args()
    begin, failed = time.monotonic(), 0
    kept = read_json(arguments.out)["cases"] if arguments.out.is_file() else {}
    work = arguments.work or Path(tempfile.mkdtemp(prefix="td-faults-"))
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work)
    for case in CASES[arguments.first : arguments.last]:
        known = case.name in kept and not kept[case.name]["failures"] and not arguments.again
        if arguments.only not in case.name or known or time.monotonic() - begin > 60 * arguments.minutes:
            continue
        found = bench.run(case) | run_info()
        failed += bool(found["failures"])
        print(
            case.name, {k: v for k, v in found.items() if k not in ("faults", "date", "commit")}, flush=True
        )
        kept[case.name] = found
        ordered = {each.name: kept[each.name] for each in CASES if each.name in kept}
        write_json(arguments.out, {"meta_info": meta_info(), "steps": STEPS, "cases": ordered})
    if arguments.work is None and not failed:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
