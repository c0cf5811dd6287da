"""The product's command line with faults: ``python -m faults.entry COMMAND ...``, as ``python -m trace_dist COMMAND ...``.

``TRACE_DIST_FAULTS`` says which (``faults.grammar``), ``TRACE_DIST_FAULTS_NOTES`` names a folder that all ranks and all starts of
the job share, ``TRACE_DIST_FAULTS_ROOT`` the run folder. The product itself reads none of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from faults.grammar import parse_faults
from faults.inject import Injector
from faults.once import Happened


def main() -> int:
    try:
        faults = parse_faults(os.environ.get("TRACE_DIST_FAULTS", ""))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if faults:
        notes = Happened(Path(os.environ["TRACE_DIST_FAULTS_NOTES"]))
        Injector(faults, notes, Path(os.environ["TRACE_DIST_FAULTS_ROOT"])).install()
    from trace_dist.cli.main import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
