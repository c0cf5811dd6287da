"""Two runs at once, whose configurations name one folder for their target."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cli.program import environment, make_config, write_config, write_tasks
from launching import python

from trace_dist.models.loading import load_model


def test_one_makes_the_base_and_the_other_waits_for_it(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    config, target = make_config(tmp_path), tmp_path / "models" / "target"
    config["target"]["path"] = str(target)
    config["target"]["tiny"]["steps"] = 60
    command = [python(), "-m", "trace_dist", "base", "--which", "target", "--config"]
    runs = []
    for name in ("one", "two"):
        path = write_config(tmp_path, config | {"run_dir": str(tmp_path / name)}, f"{name}.yaml")
        runs.append(
            subprocess.Popen(
                [*command, str(path)],
                env=environment(tmp_path / "cache"),
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
            )
        )
    outputs = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum("pretrain target: 60 steps" in output for output in outputs) == 1, outputs
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert sum(parameter.numel() for parameter in load_model(target).parameters()) > 0
