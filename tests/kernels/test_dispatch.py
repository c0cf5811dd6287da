"""Which path an op takes, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from trace_kernels import Runs, compact_gather
from trace_kernels.bench import OPS, run_bench
from trace_kernels.dispatch import strip_width, use_triton


def test_cpu_and_float64_take_the_torch_path() -> None:
    assert not use_triton("auto", torch.zeros(1))
    assert not use_triton("torch", torch.zeros(1))
    with pytest.raises(ValueError, match="float64 has no Triton path"):
        use_triton("triton", torch.zeros(1, dtype=torch.float64))


def test_operands_must_share_a_device() -> None:
    with pytest.raises(ValueError, match=r"\['cpu', 'meta'\]: must share one device"):
        use_triton("auto", torch.zeros(1), torch.zeros(1, device="meta"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="here the kernel can run on the CPU")
def test_triton_on_a_cpu_tensor_needs_the_interpreter() -> None:
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        compact_gather(torch.zeros(8), Runs.clip(torch.arange(8), 1, 0, 8, 8), impl="triton")


def test_imports_nothing_of_the_layers_above() -> None:
    code = "import sys, trace_kernels.aot, trace_kernels.bench; sys.exit('trace_dist' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=120).returncode == 0


def test_bench_times_every_op_and_the_step_it_replaces() -> None:
    rows = run_bench("cpu", sizes=[1 << 16], densities=[0.05])
    assert {row["op"] for row in rows} == {"copy", "torch_fused_adamw_dense_fp32", *OPS}
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in rows)
    with pytest.raises(ValueError, match="unknown"):
        run_bench("cpu", ops=["nonesuch"])


def test_tiles_waste_few_lanes() -> None:
    blocks = (16, 17, 64, 576, 1536, 4096, 100_000)
    assert [strip_width(block) for block in blocks] == [16, 32, 64, 128, 512, 1024, 1024]
    for block in range(512, 9000, 8):
        lanes = strip_width(block)
        assert -(-block // lanes) * lanes < 1.125 * block
