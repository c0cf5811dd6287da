"""Compiles every kernel ahead of time for GPUs that are not here: ``python -m trace_kernels.aot``.

`triton.compile` takes the target as a parameter and the wheel carries the assemblers, so that registers,
spills and the width of memory accesses can be asserted on any machine. The specialisations are those of a
launch with 16-byte aligned tensors, int32 unit ids and sizes of which nothing is known beyond what the tile
or the variant promises.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __path__ as nvidia_path
from triton.compiler import ASTSource

from .adamw_batch import _FIELDS, _adamw_batch_kernel
from .bitmask import _pack_kernel, _unpack_kernel
from .blockwise import BLOCK_SIZE
from .compact import _compact_gather_kernel, _compact_scatter_kernel
from .delta_swap import _FIELDS as _SWAP_FIELDS
from .delta_swap import _delta_swap_batch_kernel, _delta_swap_kernel
from .dispatch import NUM_THREADS, TILE
from .gap_gather import WORDS, _gap_gather_kernel
from .masked_adamw import _masked_adamw_kernel
from .masked_adamw_8bit import TILE as TILE_8BIT
from .masked_adamw_8bit import _masked_adamw_8bit_kernel
from .table import TYPES
from .unit_reduce import SPLIT, _unit_dot_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

TILES: dict[str, dict[str, Any]] = {
    "element": {"UNITS": TILE, "LANES": 0, "ALIGNED": False},
    "block16": {"UNITS": TILE // 16, "LANES": 16, "ALIGNED": True},
    "block64": {"UNITS": TILE // 64, "LANES": 64, "ALIGNED": True},
    "row": {"UNITS": 1, "LANES": TILE, "ALIGNED": True},
}

_RUN_ARGS = {
    "units_ptr": "*i32",
    "num_units": "i32",
    "num_entries": "i64",
    "block": "i32",
    "base": "i64",
    "skip": "i32",
}

_STEP_ARGS = dict.fromkeys(
    ("step_size", "correction2_sqrt", "grad_scale", "decay", "weight1", "beta2", "weight2", "eps"), "fp32"
) | {"key_1": "i32", "key_2": "i32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the argument types and constexprs of one specialisation."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    multiples: tuple[str, ...] = ()
    """Integers that are multiples of 16, as Triton finds out at a launch."""


@dataclass(frozen=True)
class CompiledReport:
    """What a compiled kernel needs of the machine."""

    name: str
    target: str
    kind: str
    """cubin or hsaco."""
    num_bytes: int
    num_regs: int
    """Registers per thread (vector registers on AMD)."""
    num_spilled_bytes: int
    """Local memory per thread: spilled registers and stack."""
    load_bytes: int
    """Widest global load of one thread."""
    store_bytes: int
    """Widest global store of one thread."""
    narrow_loads: int
    """Global loads of one thread that are narrower than 16 bytes: unit ids, table look-ups, single elements."""
    narrow_stores: int
    """Global stores likewise."""


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    attrs: Mapping[tuple[int, ...], list[list[object]]],
    target: GPUTarget,
) -> Any:
    """Compiles one specialisation of a ``@triton.jit`` function.

    Args:
        kernel: the function.
        signature: Triton type of each argument by name, e.g. ``*bf16``, ``i32``, ``fp32``.
        constexprs: value of each remaining argument; None for an absent pointer.
        attrs: by argument position, e.g. ``{(0,): [["tt.divisibility", 16]]}``.
        target: a value of `TARGETS`.

    Returns:
        Triton's ``CompiledKernel``; ``asm`` holds every stage.

    Raises:
        ValueError: TRITON_INTERPRET=1 was set when the kernels were imported.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError("kernel: interpreted, nothing to compile; unset TRITON_INTERPRET")
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs=dict(constexprs), attrs=dict(attrs))
    options = {"num_warps": NUM_THREADS // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def variants() -> Iterator[Variant]:
    """Every kernel of the package in its typical specialisations."""
    for dtype in ("bf16", "fp32"):
        yield from _adamw_8bit_variants(dtype)
        yield from _gap_gather_variants(dtype)
        for granularity, tile in TILES.items():
            suffix = f"{dtype}.{granularity}"
            yield from _support_variants(dtype, suffix, tile)
            if granularity == "element":
                continue  # nothing to reduce: the op is a plain product
            lanes = tile["LANES"]
            reduce_tile = {"UNITS": TILE // lanes, "LANES": lanes, "SPLIT": SPLIT, "ALIGNED": tile["ALIGNED"]}
            sizes = dict.fromkeys(("numel", "num_units"), "i64") | dict.fromkeys(
                ("num_splits", "block", "lead"), "i32"
            )
            pointers = {"x_ptr": f"*{dtype}", "partials_ptr": "*fp32"}
            yield _variant(f"unit_sumsq.{suffix}", _unit_dot_kernel, pointers | sizes, reduce_tile)
            pointers["y_ptr"] = f"*{dtype}"
            yield _variant(f"unit_dot.{suffix}", _unit_dot_kernel, pointers | sizes, reduce_tile)
    bit_types = {"mask_ptr": "*u8", "packed_ptr": "*u8", "n": "i64"}
    yield _variant("pack", _pack_kernel, bit_types, {"BYTES": TILE // 8})
    yield _variant("unpack", _unpack_kernel, bit_types, {"BYTES": TILE // 8})


def compile_all(target: str) -> list[CompiledReport]:
    """Compiles every variant for a key of `TARGETS`."""
    if target not in TARGETS:
        raise ValueError(f"target = {target!r}: must be one of {', '.join(TARGETS)}")
    return [_report(variant, target) for variant in variants()]


def _support_variants(dtype: str, suffix: str, tile: dict[str, Any]) -> Iterator[Variant]:
    word = {"bf16": "i16", "fp32": "i32"}[dtype]
    gather = {"src_ptr": f"*{dtype}", "out_ptr": "*fp32", "scale": "fp32"} | _RUN_ARGS
    yield _variant(f"gather.{suffix}", _compact_gather_kernel, gather, {"ACCUMULATE": False} | tile)
    gather["sumsq_ptr"] = "*fp32"
    yield _variant(f"gather_add_sumsq.{suffix}", _compact_gather_kernel, gather, {"ACCUMULATE": True} | tile)
    scatter = {"dst_ptr": f"*{dtype}", "values_ptr": "*fp32"} | _RUN_ARGS
    yield _variant(f"scatter.{suffix}", _compact_scatter_kernel, scatter, tile)
    swap = {"weight_ptr": f"*{word}", "values_ptr": f"*{word}"} | _RUN_ARGS
    yield _variant(f"swap.{suffix}", _delta_swap_kernel, swap, tile)
    swap = {"table_ptr": "*i64", "owner_ptr": "*i32", "block": "i32"}
    types = {"WORD": TYPES[{"bf16": torch.int16, "fp32": torch.int32}[dtype]], "UNIT": TYPES[torch.int32]}
    types |= {"FIELDS": _SWAP_FIELDS}
    yield _variant(f"swap_batch.{suffix}", _delta_swap_batch_kernel, swap, types | tile)

    compacts = ("master_ptr", "grad_ptr", "exp_avg_ptr", "exp_avg_sq_ptr")
    adamw = {"weight_ptr": f"*{dtype}", "last_age": "i32"} | dict.fromkeys(compacts, "*fp32") | _STEP_ARGS
    adamw |= _RUN_ARGS
    flags = {"SCALE_IS_POINTER": False, "STOCHASTIC": False} | tile
    yield _variant(f"adamw.{suffix}", _masked_adamw_kernel, adamw, flags)
    by_age = {"age_ptr": "*i32", "step_size": "*fp32", "correction2_sqrt": "*fp32", "grad_scale": "*fp32"}
    yield _variant(
        f"adamw_ages.{suffix}", _masked_adamw_kernel, adamw | by_age, flags | {"SCALE_IS_POINTER": True}
    )
    yield _batch_variant(dtype, suffix, tile)
    if dtype == "bf16":
        adamw.pop("master_ptr")
        yield _variant(
            f"adamw_stochastic.{suffix}", _masked_adamw_kernel, adamw, flags | {"STOCHASTIC": True}
        )


def _gap_gather_variants(dtype: str) -> Iterator[Variant]:
    pointers = {"src_ptr": f"*{dtype}", "starts_ptr": "*i64", "out_ptr": "*fp32"}
    for word in WORDS:
        kind = {1: "u8", 2: "i16", 4: "i32"}[word.itemsize]
        signature = pointers | {"words_ptr": f"*{kind}", "scale": "fp32", "num_words": "i64"}
        constants = {"LARGEST": torch.iinfo(word).max, "WORDS": TILE}
        yield _variant(f"gap_gather.{dtype}.element.{kind}", _gap_gather_kernel, signature, constants)


def _batch_variant(dtype: str, suffix: str, tile: dict[str, Any]) -> Variant:
    signature = {"table_ptr": "*i64", "owner_ptr": "*i32", "step": "i32", "block": "i32"} | _STEP_ARGS
    signature = {name: kind for name, kind in signature.items() if not name.startswith("key")}
    weight = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    types = {"WEIGHT": TYPES[weight], "UNIT": TYPES[torch.int32], "FIELDS": _FIELDS}
    types |= dict.fromkeys(("GRAD", "EXP_AVG", "EXP_AVG_SQ"), TYPES[torch.float32])
    flags = {"HAS_MASTER": True, "SCALE_IS_POINTER": False, "STOCHASTIC": False}
    return _variant(f"adamw_batch.{suffix}", _adamw_batch_kernel, signature, types | flags | tile)


def _adamw_8bit_variants(dtype: str) -> Iterator[Variant]:
    floats = ["master_ptr", "grad_ptr"]
    signature = {"weight_ptr": f"*{dtype}"} | _STEP_ARGS | _RUN_ARGS
    for moment in (1, 2):
        signature |= {f"codes_{moment}_ptr": "*u8", f"guess_{moment}_ptr": "*u8"}
        floats += [f"{name}_{moment}_ptr" for name in ("absmax", "values", "midpoints")]
    signature |= dict.fromkeys(floats, "*fp32")
    tile = {"SCALE_IS_POINTER": False, "TILE": TILE_8BIT, "BLOCK_SIZE": BLOCK_SIZE}
    options = tile | {"STOCHASTIC": False}
    kernel = _masked_adamw_8bit_kernel
    yield _variant(f"adamw_8bit.{dtype}.element", kernel, signature, options)
    yield _variant(f"adamw_8bit.{dtype}.block64", kernel, signature, options, multiples=("num_entries",))
    if dtype == "bf16":
        del signature["master_ptr"]
        options = tile | {"STOCHASTIC": True}
        yield _variant(f"adamw_8bit_stochastic.{dtype}.element", kernel, signature, options)


def _variant(
    name: str,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    multiples: tuple[str, ...] = (),
) -> Variant:
    """Fills in None for pointers left out and 1 for the block of an element mask, as a launch would."""
    names = kernel.arg_names
    fixed = {argument: None for argument in names if argument not in signature} | dict(constexprs)
    signature = dict(signature)
    if fixed.get("LANES") == 0:
        fixed["block"] = 1
        signature.pop("block")
    return Variant(name, kernel, signature, fixed, multiples)


def _report(variant: Variant, target: str) -> CompiledReport:
    names = variant.kernel.arg_names
    aligned = [name for name, kind in variant.signature.items() if kind.startswith("*")]
    attrs: dict[tuple[int, ...], list[list[object]]] = {
        (names.index(name),): [["tt.divisibility", 16]] for name in (*aligned, *variant.multiples)
    }
    compiled = compile_kernel(variant.kernel, variant.signature, variant.constexprs, attrs, TARGETS[target])
    kind = "cubin" if "cubin" in compiled.asm else "hsaco"
    binary = compiled.asm[kind]
    text = compiled.asm["ptx" if kind == "cubin" else "amdgcn"]
    num_regs, spilled = _nvidia_resources(binary) if kind == "cubin" else _amd_resources(text)
    widths = _ptx_widths if kind == "cubin" else _gcn_widths
    loads, stores = widths(text, "load"), widths(text, "store")
    widest = (max(loads, default=0), max(stores, default=0))
    narrow = (sum(width < 16 for width in loads), sum(width < 16 for width in stores))
    return CompiledReport(variant.name, target, kind, len(binary), num_regs, spilled, *widest, *narrow)


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = os.path.join(nvidia_path[0], "bin", "cuobjdump")
        command = [tool, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_resources(assembly: str) -> tuple[int, int]:
    usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return usage["vgpr_count"], usage["private_segment_fixed_size"]


def _ptx_widths(ptx: str, access: str) -> list[int]:
    """Bytes of each global access: e.g. ``ld.global.v4.b32`` = 16, ``st.global.b16`` = 2."""
    opcode = {"load": "ld", "store": "st"}[access]
    found = re.findall(rf"\b{opcode}\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


def _gcn_widths(assembly: str, access: str) -> list[int]:
    """Bytes of each global access: e.g. ``global_load_dwordx4`` or ``buffer_load_dwordx4`` = 16, ``global_store_short`` = 2."""
    found = re.findall(
        rf"\b(?:global|buffer)_{access}_(dwordx(\d)|dword|[us]?short\w*|[us]?byte\w*)", assembly
    )
    return [4 * int(count or 1) if "dword" in word else 2 if "short" in word else 1 for word, count in found]


def main() -> None:
    """Prints one line per compiled kernel."""
    parser = argparse.ArgumentParser(
        description="Compile every kernel ahead of time and report its resources."
    )
    parser.add_argument(
        "--target", choices=TARGETS, action="append", help="repeatable; all targets if left out"
    )
    targets = parser.parse_args().target or list(TARGETS)
    columns = f"{'bytes':>8}{'regs':>6}{'spill':>7}{'load B':>8}{'store B':>9}{'narrow':>8}"
    print(f"{'kernel':<32}{'target':>8}{'kind':>7}{columns}")
    for target in targets:
        for r in compile_all(target):
            sizes = (
                f"{r.num_bytes:>8}{r.num_regs:>6}{r.num_spilled_bytes:>7}{r.load_bytes:>8}{r.store_bytes:>9}"
            )
            print(f"{r.name:<32}{r.target:>8}{r.kind:>7}{sizes}{r.narrow_loads + r.narrow_stores:>8}")


if __name__ == "__main__":
    main()
