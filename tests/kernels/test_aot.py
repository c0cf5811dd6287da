"""Every kernel compiles for every target without its GPU, without spills, with full-width memory accesses."""

from __future__ import annotations

import os
import re

import pytest
from trace_kernels.aot import TARGETS, TILES, compile_all, compile_kernel, variants
from trace_kernels.dispatch import TILE

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, nothing to compile"
)


@pytest.fixture(scope="module", autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Compiles for real, whatever ran before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills_at_full_width(target: str) -> None:
    reports = compile_all(target)
    assert len(reports) == len(list(variants()))
    for report in reports:
        assert report.kind == ("hsaco" if target.startswith("gfx") else "cubin")
        assert report.num_bytes > 1000, report
        assert report.num_spilled_bytes == 0, report
        # 128 threads and at most 128 registers each: at least four programs on a multiprocessor of 65,536
        assert 0 < report.num_regs <= 128, report
        if "element" in report.name or report.name in ("pack", "unpack"):
            continue
        assert report.load_bytes == 16, report
        if not report.name.startswith("unit"):  # those write one sum per unit
            assert report.store_bytes == 16, report
        if not report.name.startswith("adamw_8bit"):  # its table look-ups, and its weights, are single
            # two tables for 8 entries, one scale; a row of the table of parameters and whose row it is
            look_ups = 17 if "ages" in report.name else 13 if "batch" in report.name else 0
            assert report.narrow_loads <= 2 + look_ups, report  # ids of units
            assert report.narrow_stores <= ("sumsq" in report.name or "dot" in report.name), report


def test_only_the_moments_fuse_a_multiply_and_an_add() -> None:
    """The other operations round one by one, as torch does (masked_adamw.py)."""
    variant = next(v for v in variants() if v.name == "adamw.bf16.row")
    ptx = compile_kernel(variant.kernel, variant.signature, variant.constexprs, {}, TARGETS["sm_90"]).asm[
        "ptx"
    ]
    entries_per_thread = TILE // 128
    assert len(re.findall(r"\bfma\.rn\.f32", ptx)) == 2 * entries_per_thread
    assert len(re.findall(r"\bsqrt\.rn\.f32", ptx)) == entries_per_thread
    assert len(re.findall(r"\bdiv\.rn\.f32", ptx)) == 2 * entries_per_thread


def test_tiles_are_those_of_a_launch() -> None:
    import torch
    from trace_kernels import Runs
    from trace_kernels.dispatch import plan

    for granularity, block in (
        ("element", 1),
        ("block16", 16),
        ("block64", 64),
        ("row", 1024),
        ("row", 4096),
    ):
        units = torch.arange(4, dtype=torch.int32)
        assert plan(Runs.clip(units, block, 0, 8 * block, 8 * block)).constexprs == TILES[granularity]


def test_refuses_an_unknown_target() -> None:
    with pytest.raises(ValueError, match="must be one of sm_80, sm_90, sm_100, gfx942"):
        compile_all("sm_1")
