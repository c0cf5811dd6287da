"""GPUs by name: one YAML file each in ``gpus/``, with the source of every number. An own GPU is a file of the same keys.

    name: what it is called
    memory_gib: {value: 80, source: where the number stands}

A key that an own file leaves out is that of ``h100``, but for those of the hardware itself, which it must give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from trace_dist.utils.home import from_home
from trace_dist.utils.yaml import load_yaml

FOLDER = Path(__file__).with_name("gpus")
MOST = 1e300
_OWN = ("memory_gib", "matmul_tflops", "vector_tflops", "memory_gbps", "node_gbps")
"""What every file gives: no other GPU's number would do."""


@dataclass(frozen=True)
class Gpu:
    """An accelerator, and the shares of its rates that programs reach.

    Attributes:
        name: what it is called.
        memory_gib: of its memory.
        matmul_tflops: dense bf16 products with fp32 sums, 1e12 operations per second.
        vector_tflops: fp32 products, as torch computes them unless TF32 is allowed.
        memory_gbps: of its memory, 1e9 bytes per second.
        node_gbps: to the other GPUs of a node, sent by one GPU, 1e9 bytes per second.
        matmul_share: of ``matmul_tflops`` that products reach.
        attention_share: of ``matmul_tflops`` that fused attention reaches.
        memory_share: of ``memory_gbps`` that other kernels reach.
        link_share: of a link's rate that collectives reach.
        node_us: one step of a collective between two GPUs of a node.
        network_us: one step of a collective between two nodes.
        collective_us: what a collective costs beside its steps.
        kernel_us: the shortest kernel.
        bus_gbps: between the memories of host and GPU, 1e9 bytes per second.
        host_gbps: of the host's memory, a rank's share, 1e9 bytes per second.
        host_us: the host, for each operator and launch.
        hook_us: the host, each time that DeepSpeed fetches or releases a module.
        synchronous: whether the host waits for each kernel, as on a CPU.
        measured: ``Event.operator`` -> seconds of operators and collectives that were measured by themselves.
    """

    name: str
    memory_gib: float
    matmul_tflops: float
    vector_tflops: float
    memory_gbps: float
    node_gbps: float
    matmul_share: float
    attention_share: float
    memory_share: float
    link_share: float
    node_us: float
    network_us: float
    collective_us: float
    kernel_us: float
    bus_gbps: float
    host_gbps: float
    host_us: float
    hook_us: float
    synchronous: bool = False
    measured: Mapping[str, float] = field(default_factory=dict)


def gpu_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_gpu(name: str) -> Gpu:
    """A GPU by name, or out of a YAML file of one's own.

    Raises:
        ValueError: there is none, or the file lacks a key, has one that is unknown, or a value that is no positive number.
    """
    return Gpu(**{key: each if key == "name" else each["value"] for key, each in _read(name).items()})


def sources(name: str) -> dict[str, tuple[float, str]]:
    """Key -> (value, where it stands) of a GPU.

    Raises:
        ValueError: see ``load_gpu``.
    """
    return {key: (each["value"], each["source"]) for key, each in _read(name).items() if key != "name"}


def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.yaml"
    own = name.endswith((".yaml", ".yml"))
    if own:
        path = from_home(name)
    if not path.is_file():
        cure = f"use one of {', '.join(gpu_names())}, or a YAML file of your own"
        raise ValueError(f"gpu={name!r}: {'no such file' if own else 'unknown'}; {cure}")
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"gpu={name!r}: cannot be read as YAML ({' '.join(str(error).split())}); mend it"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"gpu={name!r}: must be keys and values; see {FOLDER / 'h100.yaml'}")
    known = {each.name for each in fields(Gpu)} - {"synchronous", "measured"}
    for key in found:
        if key not in known:
            raise ValueError(f"gpu={name!r}: {key!r} is unknown; use {', '.join(sorted(known))}")
    given = {key: _sourced(name, key, value) for key, value in found.items() if key != "name"}
    missing = [key for key in ("name", *_OWN) if key not in found]
    if missing:
        raise ValueError(f"gpu={name!r}: {', '.join(missing)}: missing; see {FOLDER / 'h100.yaml'}")
    rest = known - found.keys()
    lent = {key: value for key, value in _read("h100").items() if key in rest} if rest else {}
    return {"name": str(found["name"]), **given, **lent}


def _sourced(name: str, key: str, given: Any) -> dict[str, Any]:
    """A number with its source; an own file may give the number alone."""
    value = given.get("value") if isinstance(given, dict) else given
    # beyond MOST an int is no float any more
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
        raise ValueError(f"gpu={name!r}: {key}={value!r:.80}: must be a positive number; give one")
    if key.endswith("_share") and value > 1:
        raise ValueError(f"gpu={name!r}: {key}={value!r}: is a share; give at most 1")
    return {
        "value": float(value),
        "source": str(given.get("source", name)) if isinstance(given, dict) else name,
    }
