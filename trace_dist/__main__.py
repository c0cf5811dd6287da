"""``python -m trace_dist``: the same as ``trace-dist``, for launchers that start a module."""

import sys

from trace_dist.cli import main

sys.exit(main())
