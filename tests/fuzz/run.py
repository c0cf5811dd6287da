"""Damage the file of every reader many times, and keep the counts.

    PYTHONPATH=tests python -m fuzz.run --cases 10000 --out docs/results/fuzz.json

Counts of readers that are not tried this time stay in the file. With ``--missing`` those are tried that have had fewer cases than
that, or failures; one that was cut goes on.
"""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

from fuzz.cases import GROWTH_MIB, SECONDS, fuzz
from fuzz.readers import READERS

from trace_dist.utils.env import meta_info, run_info
from trace_dist.utils.files import read_json, write_json

ADDRESS_SPACE = 24 * 2**30
"""Bytes that the process may ask for."""
PART = 500
"""Cases between two writes of the file."""
LIMITS = {"seconds_per_file": SECONDS, "growth_mib": GROWTH_MIB, "address_space_bytes": ADDRESS_SPACE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="damaged files per reader")
    parser.add_argument("--missing", action="store_true", help="what the file does not have yet")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    # what transformers says of odd configs
    logging.disable(logging.WARNING)
    kept = read_json(arguments.out)["readers"] if arguments.out and arguments.out.is_file() else {}
    failed = 0
    for reader in READERS:
        if arguments.only not in reader.name:
            continue
        found: dict[str, Any] = kept.get(reader.name, {}) if arguments.missing else {}
        if found.get("failures"):
            found = {}
        while (done := cases(found)) < arguments.cases:
            begin = time.perf_counter()
            part = fuzz(reader, done, min(PART, arguments.cases - done))
            found = together(found, part | {"seconds": round(time.perf_counter() - begin, 1)}) | run_info()
            kept[reader.name] = found
            if arguments.out is not None:
                write(arguments.out, kept)
        failed += len(found["failures"])
        print(reader.name, {**found, "failures": found["failures"][:10]}, flush=True)
    sys.exit(1 if failed else 0)


def cases(found: dict[str, Any]) -> int:
    """How many were tried."""
    return sum(found.get(outcome, 0) for outcome in ("read", "refused", "failed"))


def together(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two parts of the cases of a reader have come to."""
    both = {key: one.get(key, 0) + other.get(key, 0) for key in ("refused", "read", "failed", "growth_mib")}
    both |= {
        "slowest_s": max(one.get("slowest_s", 0.0), other["slowest_s"]),
        "failures": [*one.get("failures", []), *other["failures"]],
        "seconds": round(one.get("seconds", 0.0) + other["seconds"], 1),
    }
    return {key: value for key, value in both.items() if key != "failed" or value}


def write(path: Path, readers: dict[str, Any]) -> None:
    """The counts of the readers in order, and where they were taken."""
    ordered = {reader.name: readers[reader.name] for reader in READERS if reader.name in readers}
    write_json(path, {"meta_info": meta_info(), "limits": LIMITS, "readers": ordered})


if __name__ == "__main__":
    main()
