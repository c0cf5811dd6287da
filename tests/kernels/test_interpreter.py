"""Runs every kernel test on the Triton path without a GPU.

Triton decides when a kernel is decorated whether to interpret it, so the interpreter needs a process whose
environment says so before the first import; this one keeps compiled kernels for `test_aot.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this is already the interpreter's process"
)
def test_the_triton_path_under_the_interpreter() -> None:
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(folder),
        str(folder.parent / "optim" / "test_batches.py"),
        "-k",
        "triton and not float64",
        "-p",
        "no:cacheprovider",
    ]
    paths = [str(folder.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    # addopts hold one -q, which leaves the summary line
    summary = re.search(r"(\d+) passed", result.stdout)
    assert summary, result.stdout[-2000:]
    assert int(summary[1]) > 250
