"""Standard streams as a command needs them: each is there, and an error of the output says whose it is."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

OUTPUT = "standard output"
"""What errors call it, in place of a path."""


class _Output(io.FileIO):
    """Standard output, whose errors have its name."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = OUTPUT
            raise


def open_streams() -> None:
    """Open what this process was started without (``>&-``), as ``/dev/null``.

    Python has None for a closed stream; and the next file that is opened would get its number, and with it all that is written
    there by number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free; processes that are started have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def name_output() -> None:
    """From now on an error in writing to standard output has ``OUTPUT`` as its ``filename``."""
    stream = sys.stdout
    if type(stream) is not io.TextIOWrapper or stream is not sys.__stdout__:
        return
    stream.flush()
    raw = _Output(stream.fileno(), "w", closefd=False)
    options: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    buffer: Any = raw if stream.write_through else io.BufferedWriter(raw)
    sys.stdout = io.TextIOWrapper(buffer, stream.encoding, stream.errors, **options)


def lose_output() -> None:
    """What is still to be written to standard output is lost, also at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
