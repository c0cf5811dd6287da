"""Where files lie that launchers read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trace_dist.utils.files import writing


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process, gone after the block.

    Raises:
        ValueError: it cannot be made where temporary files belong.
    """
    with ExitStack() as stack:
        with writing(f"TMPDIR={os.environ.get('TMPDIR', '/tmp')!r}"):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trace_dist-"))
        yield Path(folder)
