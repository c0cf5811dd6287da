"""Wrong input, given to the real program: one line that names the field and the cure, before anything is trained.

What counts is the line and what lies in the folder, so most commands run in this process; those that start others do not.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.program import error_line, files, make_config, run, run_here, write_config, write_tasks
from launching import free_port

from trace_dist.masks import Mask, UnitLayout

DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    write_tasks(tmp_path)
    return make_config(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def edited(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with the field ``a.b.0.c`` set."""
    changed = deepcopy(config)
    *parents, last = path.split(".")
    place: Any = changed
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("field", "value", "fragments"),
    [
        ("mask.densty", 0.1, ["mask.densty", "not accept"]),
        ("tasks.1.colour", "red", ["colour", "not accepted", "trace-dist --help"]),
        ("mask.density", "much", ["mask.density", "float", "much"]),
        ("mask.density", 0, ["mask.density=0", "must lie in (0, 1]", "use for example 0.05"]),
        ("mask.density", 1.5, ["mask.density=1.5", "must lie in (0, 1]", "use for example 0.05"]),
        ("mask.granularity", "diagonal", ["mask.granularity", "'element', 'block', 'row'", "diagonal"]),
        ("tasks.1.reasoning_gym", {"dataset": "spell_backward"}, ["tasks.twist", "exactly one of", "one source"]),
        ("launch.num_ranks", 2, ["launch.num_ranks=2", "needs a launcher", "set launch.launcher"]),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, list) else "",
)  # fmt: skip
def test_a_config_that_makes_no_sense(
    field: str, value: Any, fragments: list[str], config: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, edited(config, field, value))
    line = error_line(run_here("run", "--config", path, cache=cache))
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "run").exists()


def test_a_missing_config_file(cache: Path, tmp_path: Path) -> None:
    line = error_line(run("run", "--config", "absent.yaml", cache=cache))
    assert "absent.yaml" in line
    assert "does not exist" in line


def test_a_config_that_is_not_yaml(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("{{{")
    line = error_line(run("train", "--config", tmp_path / "broken.yaml", cache=cache))
    assert "broken.yaml': line 1: while parsing a flow node" in line


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "kernels"),
        ("memory", "estimate", "--model", "config.json"),
        ("memory", "plan", "--model", "config.json", "--gpus", "2", "--gpu_gib", "24"),
        ("simulate", "--model", "config.json"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_result_that_cannot_be_written(words: tuple[str, ...], cache: Path, tmp_path: Path) -> None:
    """Said before the work is begun: there is no such model."""
    file = tmp_path / "file"
    file.write_text("kept")
    for out, said in ((tmp_path, "is a folder; name a file"), (file / "found.json", "cannot be written")):
        assert f"out='{out}': {said}" in error_line(run_here(*words, "--out", out, cache=cache))
    assert file.read_text() == "kept"


def test_an_unknown_command(cache: Path) -> None:
    assert "invalid choice: 'trian'" in error_line(run("trian", cache=cache))


def test_a_missing_task_file_can_be_mended_in_the_same_run_folder(
    config: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, edited(config, "tasks.0.path", str(tmp_path / "absent.jsonl")))
    line = error_line(run("run", "--config", path, cache=cache))
    assert "tasks.copy.path=" in line
    assert "absent.jsonl': no such file or folder; fix the path" in line
    assert files(tmp_path / "run") == [".trace-dist-run", "config.yaml", "logs/base-target.log"]

    path = write_config(tmp_path, config)
    done = run_here("base", "--config", path, "--which", "proxy", cache=cache)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["tasks"][0]["path"].endswith(
        "copy.jsonl"
    )

    line = error_line(run_here("base", "--config", path, "--seed", 1, cache=cache))
    assert "run_dir=" in line
    assert "made with other values of seed; choose another run_dir, or delete this one" in line


@pytest.mark.parametrize(
    ("content", "fragment"),
    [(None, "no such mask file; check the path"), (b"\x10\0\0\0\0\0\0\0{", "corrupt mask file")],
    ids=["missing", "corrupt"],
)
def test_a_mask_file_that_cannot_be_read(
    content: bytes | None, fragment: str, config: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "mask.safetensors"
    if content is not None:
        mask.write_bytes(content)
    path = write_config(tmp_path, config)
    line = error_line(run_here("train", "--config", path, "--mask_file", mask, cache=cache))
    assert f"{mask}: " in line
    assert fragment in line
    assert files(tmp_path / "run") == [".trace-dist-run", "config.yaml"]


def test_a_prompt_longer_than_the_context(config: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    """A tiny Llama has 256 positions; the task is read before its base is trained."""
    with (tmp_path / "twist.jsonl").open("a") as lines:
        lines.write('{"prompt": "twist %s", "answer": "a"}\n' % ("abc" * 100))
    path = write_config(tmp_path, config)
    line = error_line(run_here("base", "--config", path, cache=cache))
    assert "tasks.twist: a training example needs 305 tokens" in line
    assert "the target has 256 positions" in line
    assert "set data.max_length to at most 256 with data.truncate_prompt=true" in line
    assert files(tmp_path / "run") == [".trace-dist-run", "config.yaml"]


def test_a_prompt_longer_than_max_length(config: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, edited(config, "data.max_length", 8))
    line = error_line(run_here("base", "--config", path, cache=cache))
    assert "exceed data.max_length=8; raise data.max_length or set data.truncate_prompt=true" in line
    assert files(tmp_path / "run") == [".trace-dist-run", "config.yaml"]


def test_a_mask_of_another_model(config: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, config)
    assert run_here("base", "--config", path, "--which", "target", cache=cache).returncode == 0
    before = files(tmp_path / "run")
    up = "model.layers.0.mlp.up_proj.weight"
    for name, shape, meta, fragment in (
        (up, (48, 32), {"model": "0" * 32}, f"made for model {'0' * 32}, but the model given is"),
        ("w", (48, 32), {}, "mask: parameter 'w' is not in the model; give the mask that was made for"),
        (up, (32, 48), {}, f"mask: '{up}' has shape (32, 48) in the mask but (48, 32) in the model"),
    ):
        units = torch.tensor([3, 5], dtype=torch.int32)
        Mask({name: units}, {name: UnitLayout(shape, 1)}, "element", meta).save(tmp_path / "mask.safetensors")
        arguments = ["--config", path, "--mask_file", tmp_path / "mask.safetensors"]
        assert fragment in error_line(run_here("train", *arguments, cache=cache))
    assert files(tmp_path / "run") == before


@pytest.mark.launcher
def test_backend_single_under_two_ranks(config: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, config)
    launcher = [*DEEPSPEED, str(free_port()), "--module"]
    line = error_line(run("train", "--config", path, cache=cache, launcher=launcher))
    assert "backend='single': 2 ranks were started; set --backend zero3, or start one process" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.launcher
def test_a_wrong_config_under_two_ranks_is_one_line(
    config: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    path = write_config(tmp_path, edited(config, "mask.density", "much"))
    launcher = [*DEEPSPEED, str(free_port()), "--module"]
    assert "mask.density" in error_line(run("train", "--config", path, cache=cache, launcher=launcher))


def test_eval_refuses_a_bank_before_it_makes_a_base(
    config: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    """``--bank`` is the one that it retrieves from: the target as it is was scored instead."""
    path, bank = write_config(tmp_path, config), tmp_path / "nowhere"
    line = error_line(run_here("eval", "--config", path, "--bank", bank, cache=cache))
    assert str(bank / "bank.json") in line
    assert not (tmp_path / "run" / "models").exists()
