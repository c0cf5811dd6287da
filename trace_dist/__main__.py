"""The program ``trace-dist``, also as ``python -m trace_dist``, for launchers that start a module."""

import signal
import sys


def main() -> int:
    """Run one command; Ctrl+C while the program is still being read ends it as it ends any other, without a traceback."""
    asks = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if asks:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from trace_dist.cli import main as run

    if asks:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
