"""Runs a command on a host for a launcher on another one, and ends it with all that it started when that launcher is gone.

    python -m trace_dist.launching.tether COMMAND ARGUMENTS...

The launcher holds the other end of standard input, through ssh. However it ends, or ssh, the input ends too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from trace_dist.launching.ending import end_tree


def main(command: list[str]) -> int:
    """Run the command; its exit code."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def hold() -> None:
        while os.read(0, 4096):
            pass
        end_tree(process.pid)

    threading.Thread(target=hold, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: end_tree(process.pid))
    code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
