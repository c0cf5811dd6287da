"""Rank 1 looks for no file of rank 0's before rank 0 has said that it is there, as hosts of a shared file system must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trace_dist.config import RunConfig
from trace_dist.continual import masks
from trace_dist.continual import setting as module
from trace_dist.continual.earlier import bank_before
from trace_dist.continual.methods.one_set import _missing
from trace_dist.continual.proxy import proxy_origin
from trace_dist.continual.setting import Recipe, Setting
from trace_dist.masks import Mask, UnitLayout
from trace_dist.masks.storage import save_saliency
from trace_dist.models.origin import Origin
from trace_dist.run_folder import RunFolder
from trace_dist.utils import dist

MASK = Mask({"w": torch.tensor([1, 3], dtype=torch.int32)}, {"w": UnitLayout((4, 4), 1)}, "element")


class Rank1:
    """What rank 0 says to rank 1; whoever looks at a file before that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told = False
        self.says: list[tuple[Any, Callable[[], None]]] = []
        real = Path.is_file

        def is_file(path: Path) -> bool:
            assert self.told, f"rank 1 looks for {path.name}"
            return real(path)

        monkeypatch.setattr(Path, "is_file", is_file)
        monkeypatch.setattr(dist, "world_size", lambda: 2)
        monkeypatch.setattr(dist, "rank", lambda: 1)
        monkeypatch.setattr(dist, "broadcast_object", self._broadcast)
        monkeypatch.setattr(dist, "gather_objects", lambda value: [None, value])

    def _broadcast(self, value: object) -> Any:
        assert value is None, "rank 1 has worked out what rank 0 says"
        answer, meanwhile = self.says.pop(0)
        meanwhile()
        return answer, None


@pytest.fixture
def rank_1(monkeypatch: pytest.MonkeyPatch) -> Rank1:
    return Rank1(monkeypatch)


@pytest.fixture
def setting(tmp_path: Path) -> Any:
    mask = SimpleNamespace(isolation="shared", block=1, maskable=None, density=0.5)
    cfg = SimpleNamespace(mask=mask, folder=RunFolder(tmp_path), seed=0)
    return Setting(cfg, None, tmp_path, "base")  # type: ignore[arg-type]


def stream() -> Any:
    return SimpleNamespace(task=SimpleNamespace(name="a"))


def test_a_mask_that_is_there(rank_1: Rank1, setting: Any) -> None:
    def meanwhile() -> None:
        MASK.save(setting.folder.mask("a"))
        rank_1.told = True

    rank_1.says = [(True, meanwhile)]
    assert setting.mask_for(stream()) == MASK


def test_a_mask_that_is_made(rank_1: Rank1, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 writes it while all project, and rank 1 sees it then."""

    def project(*_: object) -> None:
        MASK.save(setting.folder.mask("a"))
        rank_1.told = True

    monkeypatch.setattr(Setting, "project", project)
    rank_1.says = [(False, lambda: None)]
    assert setting.mask_for(stream()) == MASK


def test_a_method_s_own_mask(rank_1: Rank1, setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All make it or none does, whatever lies on this host."""
    made = MASK.with_meta(task="a")
    recipe = Recipe("own", "me", lambda *_: made)
    monkeypatch.setattr(Setting, "model", None)
    monkeypatch.setattr(module, "layouts_for", lambda *_: {})
    rank_1.says = [(False, lambda: None), (None, lambda: None)]
    assert setting.own_mask(stream(), recipe).meta["method"] == "me"

    def meanwhile() -> None:
        made.save(setting.folder.mask("a", "own"))
        rank_1.told = True

    rank_1.says = [(True, meanwhile)]
    assert setting.own_mask(stream(), recipe) == made


def test_a_bank_that_is_not_there(rank_1: Rank1, tmp_path: Path) -> None:
    cfg = RunConfig.__new__(RunConfig)
    task = SimpleNamespace(name="a")
    for name, value in {"run_dir": str(tmp_path), "tasks": [task]}.items():
        object.__setattr__(cfg, name, value)
    object.__setattr__(cfg, "bank", SimpleNamespace(path=None))
    rank_1.says = [(False, lambda: None), (False, lambda: None)]
    assert bank_before(cfg, "retrieved", "base") == (None, [])
    assert _missing(cfg) == ["a"]


def test_what_the_probe_has_left(rank_1: Rank1, setting: Any) -> None:
    def meanwhile() -> None:
        MASK.save(setting.folder.proxy_mask("a"))
        rank_1.told = True

    rank_1.says = [(True, meanwhile)]
    assert masks._proxy_mask(setting.cfg, "a") == MASK


@pytest.mark.parametrize(
    "read",
    [
        lambda cfg: masks._proxy_mask(cfg, "a"),
        lambda cfg: masks._transferred(None, cfg, "a", {}),
        lambda cfg: masks._chosen_again(MASK, cfg.folder.saliency("a"), {"w": torch.tensor([0])}),
    ],
)
def test_what_one_rank_cannot_read_is_an_error_on_all(
    read: Callable[[Any], Any], rank_1: Rank1, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = setting.folder
    MASK.save(folder.proxy_mask("a"))
    save_saliency(folder.saliency("a"), {"w": torch.rand(16)}, MASK.layouts, {})
    rank_1.told = True
    rank_1.says = [(True, lambda: None)]
    monkeypatch.setattr(dist, "gather_objects", lambda mine: [(ValueError, "torn on rank 0"), mine])
    with pytest.raises(ValueError, match="torn on rank 0"):
        read(setting.cfg)
    # What is wrong here reaches the others.
    told: list[Any] = []
    monkeypatch.setattr(dist, "gather_objects", lambda mine: told.append(mine) or [None, mine])
    for path in (folder.proxy_mask("a"), folder.saliency("a")):
        path.write_bytes(b"torn")
    rank_1.says = [(True, lambda: None)]
    with pytest.raises(ValueError, match="safetensors"):
        read(setting.cfg)
    assert told[0][0] is ValueError


def test_where_a_proxy_comes_from(rank_1: Rank1, tmp_path: Path) -> None:
    cfg: Any = SimpleNamespace(proxy=SimpleNamespace(path=str(tmp_path), prune=None))
    cfg.target, cfg.probed = SimpleNamespace(path="target"), cfg.proxy
    origin = Origin("base", "layers", [0])
    model: Any = None
    rank_1.says = [(origin, lambda: None), (origin, lambda: None)]
    assert proxy_origin(cfg, model, "base") == origin
    with pytest.raises(ValueError, match="it was cut out of another model"):
        proxy_origin(cfg, model, "other")
