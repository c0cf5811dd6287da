"""The whole pipeline on three hosts has the losses, deltas and scores of three ranks on one. It takes minutes: ``make hosts``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli.program import make_config, write_config, write_tasks
from hosts import namespaces
from hosts.namespaces import Hosts
from hosts.test_hosts import curve, on, run

WANTED = "TRACE_DIST_THREE_HOSTS"
LONGEST = 3600.0
"""Seconds of a whole run, on a machine that has much else to do."""
pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(WANTED not in os.environ, reason="takes minutes; `make hosts` runs it"),
    pytest.mark.timeout(14400),
]


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    reason = namespaces.forbidden()
    if reason is not None:
        pytest.skip(reason)
    with namespaces.hosts(3) as found:
        yield found


def configured(root: Path, name: str, **launch: Any) -> str:
    """A run of two tasks on three ranks with a folder of its own."""
    config = make_config(root / name) | {"backend": "fsdp2", "continual": {"methods": ["retrieved"]}}
    config["tasks"] = [{"name": task, "path": str(root / f"{task}.jsonl")} for task in ("copy", "twist")]
    config["general"] = [{"name": "plain", "path": str(root / "plain.jsonl")}]
    config["train"] |= {"log_every": 1, "batch_size": 9, "micro_batch_size": 3}
    config["bank"] |= {"layer": 0}
    config["launch"] = {"num_ranks": 3, **launch}
    return write_config(root, config, f"{name}.yaml").name


def found(root: Path, name: str) -> dict[str, Any]:
    """Curves, deltas and scores."""
    folder = root / name / "run"
    deltas = sorted((folder / "bank" / "tasks").glob("*/delta.safetensors"))
    assert len(deltas) == 2
    method = json.loads((folder / "results.json").read_text())["modes"]["retrieved"]
    return {
        "curve": curve(root / name, "run"),
        "deltas": {delta.parent.name: delta.read_bytes() for delta in deltas},
        "scores": [method["R"], method["general"]],
    }


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("three-hosts")
    write_tasks(root)
    done = run(
        root,
        ["python", "-m", "trace_dist", "run", "--config", configured(root, "one", launcher="torchrun")],
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, found(root, "one")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_the_whole_pipeline(three: Hosts, one_host: tuple[Path, dict[str, Any]], launcher: str) -> None:
    root, expected = one_host
    config = configured(root, launcher, launcher=launcher, hostfile=str(three.hostfile))
    done = run(
        root, on(three, root, 1, "python", "-m", "trace_dist", "run", "--config", config), timeout=LONGEST
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected["curve"]
    assert found(root, launcher) == expected
