"""Damaged copies given to a reader: each is read as something, or refused in one line, in bounded time and memory."""

from __future__ import annotations

import resource
import time
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from fuzz.mutate import mutated
from fuzz.reader import Reader

SECONDS = 5.0
"""What one file of a few KiB may take of a core."""
GROWTH_MIB = 512
"""By how much the process may grow over all files of a reader."""


def fuzz(reader: Reader, first: int, count: int) -> dict[str, Any]:
    """Damage a file in ``count`` ways.

    Args:
        reader: what reads it.
        first: number of the first way; each number stands for one damage.
        count: how many.

    Returns:
        Numbers of files that were ``read`` and ``refused``, and ``failures``: number of the damage and what went wrong.
    """
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    slowest, before = 0.0, _peak_mib()
    with TemporaryDirectory() as name:
        folder = Path(name) / "inside" / "here"
        folder.mkdir(parents=True)
        path = reader.make(folder)
        kept = {each: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
        if (whole := _outcome(reader, path)) != "read":
            failures.append((-1, f"undamaged: {whole}"))
        for number in range(first, first + count):
            # a new file, not new bytes: what was read of the last one may still be mapped
            for each, content in kept.items():
                each.unlink(missing_ok=True)
                each.write_bytes(content)
            path.unlink()
            path.write_bytes(mutated(kept[path], reader.kind, Random(f"{reader.name}/{number}"), reader.sign))
            begin = time.process_time()
            outcome = _outcome(reader, path)
            took = time.process_time() - begin
            slowest = max(slowest, took)
            if took > SECONDS:
                outcome = f"took {took:.1f} s"
            counts[outcome if outcome in ("read", "refused") else "failed"] += 1
            if outcome not in ("read", "refused"):
                failures.append((number, outcome))
        outside = [str(each) for each in Path(name).iterdir() if each.name != "inside"]
    if outside:
        failures.append((-1, f"wrote {outside}"))
    growth = _peak_mib() - before
    if growth > GROWTH_MIB:
        failures.append((-1, f"grew by {growth:.0f} MiB"))
    return {**counts, "slowest_s": round(slowest, 3), "growth_mib": round(growth), "failures": failures}


def _outcome(reader: Reader, path: Path) -> str:
    try:
        reader.read(path)
    except ValueError as error:
        return "refused" if str(error).strip() else f"{type(error).__name__} without a message"
    except KeyboardInterrupt:
        raise
    # AssertionErrors, exits and panics of extensions among them.
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
