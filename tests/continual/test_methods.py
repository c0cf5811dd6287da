"""Methods as drop-in parts: a row and a file make one, and what cannot run is refused before any work."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from continual.cuts import FROZEN
from continual.small import TASKS, make_config, result

from trace_dist.config import ContinualConfig, RunConfig
from trace_dist.continual.driver import check_methods, run_continual
from trace_dist.parts import METHODS
from trace_dist.run_folder import RunFolder
from trace_dist.stages.report import collect_results
from trace_dist.utils import dist

DENSE = (
    *("full", "lora", "lora_retrieved", "ewc", "ella", "ps", "osft", "olora", "slao", "shira_random"),
    *("joint", "separate"),
)
"""Methods that train no mask of ours, in one process."""

OF_THEIR_OWN = '''
"""Answers with the base; it learns how many tasks there were."""

from dataclasses import dataclass

from trace_dist.continual.methods.base import Method
from trace_dist.train.loop import TrainResult
from trace_dist.utils.files import read_json, write_json


@dataclass(frozen=True)
class Options:
    """Of the method."""

    patience: int = 1
    """How long a lesson takes."""


class Idle(Method):
    """Learns nothing."""

    label = "does nothing"
    colour = "green"
    masked = False
    on_ranks = True
    tasks = ()

    def learn(self, stream):
        self.tasks = (*self.tasks, stream.task.name)
        return TrainResult(losses=[(1, float(self.options.patience))], durations=[0.5], seconds=0.5)

    def score(self):
        return self.setting.base_row

    def facts(self):
        return {"lessons": list(self.tasks)}

    def state(self, folder):
        write_json(folder / "tasks.json", self.tasks)

    def load_state(self, folder):
        self.tasks = tuple(read_json(folder / "tasks.json"))


METHOD = Idle
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module outside the package that holds a method."""
    (tmp_path / "their_idle_method.py").write_text(OF_THEIR_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_idle_method"
    sys.modules.pop("their_idle_method", None)


def with_methods(cfg: RunConfig, *names: str, **options: dict[str, Any]) -> RunConfig:
    return replace(cfg, continual=ContinualConfig(list(names), options))


def test_one_file_and_one_row_make_a_method(
    fresh: RunConfig, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS.homes, "idle", module)
    run_continual(with_methods(fresh, "idle", idle={"patience": 3}))
    found = result(fresh, "idle")
    shown = {key: found[key] for key in ("label", "colour", "masked", "on_ranks", "options")}
    assert shown == {
        "label": "does nothing",
        "colour": "green",
        "masked": False,
        "on_ranks": True,
        "options": {"patience": 3},
    }
    assert found["lessons"] == list(TASKS)
    assert found["losses"] == {task: [[1, 3.0]] for task in TASKS}
    assert len(found["R"]) == 3
    assert collect_results(fresh)["modes"]["idle"]["label"] == "does nothing"


def test_a_module_path_is_a_method(
    fresh: RunConfig, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").touch()
    (tmp_path / f"{module}.py").rename(tmp_path / "theirs" / "idle.py")
    run_continual(with_methods(fresh, "theirs.idle"))
    assert result(fresh, "theirs.idle")["label"] == "does nothing"


def test_a_method_of_their_own_goes_on_where_it_was_cut(
    fresh: RunConfig, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS.homes, "idle", module)
    cfg = with_methods(fresh, "idle")
    kind = METHODS.load("idle").METHOD
    learn, lessons = kind.learn, []

    def mortal(self: Any, stream: Any) -> Any:
        lessons.append(stream.task.name)
        if len(lessons) == 2:
            raise KeyboardInterrupt
        return learn(self, stream)

    monkeypatch.setattr(kind, "learn", mortal)
    with pytest.raises(KeyboardInterrupt):
        run_continual(cfg)
    run_continual(cfg)
    assert lessons == [TASKS[0], TASKS[1], TASKS[1]]
    assert result(cfg, "idle")["lessons"] == list(TASKS)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("merged", {"replay": 1.0}, "continual.options.merged.replay=1.0: must lie in [0, 1); "),
        ("merged", {"replay": float("nan")}, "continual.options.merged.replay=nan: must be finite; "),
        (
            "merged",
            {"replay_memory": 0.0},
            "continual.options.merged.replay_memory=0.0: must lie in (0, 1]; ",
        ),
        ("merged", {"lr": -1.0}, "continual.options.merged.lr=-1.0: must be positive; "),
        ("full", {"lr": 0.0}, "continual.options.full.lr=0.0: must be positive; "),
        ("full", {"replay": 1.0}, "continual.options.full.replay=1.0: must lie in [0, 1); "),
        ("lora", {"replay_memory": 2.0}, "continual.options.lora.replay_memory=2.0: must lie in (0, 1]; "),
        (
            "joint",
            {"replay": 0.1},
            "continual.methods 'joint': 'replay' is not an option; its options are lr",
        ),
        ("separate", {"lr": -1.0}, "continual.options.separate.lr=-1.0: must be positive; "),
        ("lora_retrieved", {"rank": 0}, "continual.options.lora_retrieved.rank=0: must be at least 1; "),
        ("ewc", {"strength": -1.0}, "continual.options.ewc.strength=-1.0: must be at least 0; "),
        ("ewc", {"examples": 0}, "continual.options.ewc.examples=0: must be at least 1; "),
        ("ella", {"strength": float("nan")}, "continual.options.ella.strength=nan: must be finite; "),
        ("ps", {"strength": -1.0}, "continual.options.ps.strength=-1.0: must be at least 0; "),
        ("ps", {"replay": 1.0}, "continual.options.ps.replay=1.0: must lie in [0, 1); "),
        ("osft", {"keep": 1.0}, "continual.options.osft.keep=1.0: must lie in (0, 1); "),
        ("olora", {"strength": -0.5}, "continual.options.olora.strength=-0.5: must be at least 0; "),
        ("olora", {"rank": 0}, "continual.options.olora.rank=0: must be at least 1; "),
        ("slao", {"replay": -0.1}, "continual.options.slao.replay=-0.1: must lie in [0, 1); "),
        ("shira_random", {"rank": 0}, "continual.options.shira_random.rank=0: must be at least 1; "),
        ("full", {"lr": float("inf")}, "continual.options.full.lr=inf: must be finite; "),
        ("lora", {"rank": 0}, "continual.options.lora.rank=0: must be at least 1; "),
        ("lora", {"rank": 1.5}, "continual.methods 'lora': "),
        ("lora", {"lr": float("nan")}, "continual.options.lora.lr=nan: must be finite; "),
        ("retrieved", {"lr": float("inf")}, "continual.options.retrieved.lr=inf: must be finite; "),
        ("random", {"lr": 0.0}, "continual.options.random.lr=0.0: must be positive; "),
        (
            "random",
            {"replay": 0.1},
            "continual.methods 'random': 'replay' is not an option; its options are lr",
        ),
    ],
)
def test_options_are_checked(tmp_path: Path, method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        check_methods(with_methods(make_config(tmp_path, ["retrieved"]), method, **{method: options}))
    assert "\n" not in str(caught.value)


def test_options_of_a_method_that_is_not_run_are_checked_too(tmp_path: Path) -> None:
    cfg = with_methods(make_config(tmp_path, ["retrieved"]), "retrieved", lora={"rank": 0})
    with pytest.raises(ValueError, match="rank=0"):
        check_methods(cfg)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", r"continual.methods='nope': there is no such part; choose among retrieved, "),
        ("no.such.module", r"continual.methods='no.such.module': cannot be imported"),
        ("trace_dist.continual.judge", r"the module has no METHOD, a subclass of"),
    ],
)
def test_what_is_no_method_is_refused_before_any_work(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_continual(with_methods(make_config(tmp_path, ["retrieved"]), name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", DENSE)
def test_dense_weights_are_not_trained_on_a_quantised_target(tmp_path: Path, name: str) -> None:
    cfg = make_config(tmp_path, ["retrieved"])
    pytest.importorskip("bitsandbytes")
    cfg = with_methods(replace(cfg, target=replace(cfg.target, tiny=None, quantize="nf4")), name)
    with pytest.raises(
        ValueError, match=rf"continual.methods='{name}': trains dense weights, but target.quantize"
    ):
        run_continual(cfg)


def test_methods_of_one_process_are_refused_on_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object", lambda value: value)
    cfg = with_methods(make_config(tmp_path, ["retrieved"]), "retrieved", "lora", "full")
    with pytest.raises(ValueError, match=r"\['lora', 'full'\]: they run in one process"):
        run_continual(cfg)
    assert not RunFolder.of(cfg.run_dir).tasks.exists()


def test_every_method_of_the_package_says_what_it_is() -> None:
    for entry in check_methods(make_config(Path("unused"), list(METHODS))):
        assert entry.kind.label
        assert entry.kind.colour
        assert entry.kind.masked == (entry.name not in (*DENSE, *FROZEN))
        assert entry.kind.on_ranks == (entry.name not in DENSE)
