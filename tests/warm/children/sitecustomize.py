"""Python imports this at its start: an interpreter of its own whose children are forked from a warm process."""

import os
import sys

sys.executable = os.environ["TEST_PYTHON"]
