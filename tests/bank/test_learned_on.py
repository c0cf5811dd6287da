"""What was learned on a 4-bit base says so, and is not put beside other weights in silence."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from bank.samples import base_model, make_delta, signature
from engine.cases import CASES

from trace_dist import Delta, DeltaBank, Mask, load_sharded
from trace_dist.bank.bank import BASE
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import extract_delta
from trace_dist.bank.export import export
from trace_dist.bank.folder import read_task
from trace_dist.bank.learned_on import learned_on, warn_of_others
from trace_dist.config import ModelConfig, RunConfig, TaskConfig
from trace_dist.models import fingerprint
from trace_dist.models.rest import CARD
from trace_dist.stages.evaluate import run_evaluate


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the package warns of in the block."""
    said: list[str] = []
    logger, handler = logging.getLogger("trace_dist"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.fixture
def base(tmp_path: Path) -> str:
    CASES["element"].model().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def coded(base: str) -> list[Delta]:
    """Two deltas of the base in 4 bits."""
    pytest.importorskip("bitsandbytes")
    model = load_sharded(base, "float32", quantize="nf4")
    masks = [Mask.random(model, 0.05, seed=seed) for seed in range(2)]
    found = [extract_delta(model, mask, name) for name, mask in zip(("one", "two"), masks, strict=True)]
    assert compose(found, model, "both").mask.meta["quantize"] == "nf4"
    return found


def test_a_bank_of_a_4_bit_base(base: str, coded: list[Delta], tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(base), layer=1)
    bank.add(signature(BASE, 0), None)
    assert learned_on(bank) == "none"
    bank.add(signature("one", 1), coded[0])
    assert bank.facts("one")["quantize"] == "nf4"
    # Where the index is another one, the delta says it.
    task = read_task(bank.path("one").parent, bank)
    assert task.delta is not None
    assert task.delta.mask.meta["quantize"] == "nf4"
    assert learned_on(bank) == "nf4"
    with warnings() as said:
        warn_of_others(bank, "nf4")
    assert not said
    with warnings() as said:
        warn_of_others(bank, "none")
    assert "one of the bank" in said[0]
    assert "learned on a 4-bit base" in said[0]
    with warnings() as said:
        export(bank, ["one"], tmp_path / "out", base)
    assert "one: learned on a 4-bit base" in said[0]
    assert json.loads((tmp_path / "out" / CARD).read_text())["learned_on"] == "nf4"


def test_tasks_of_either_kind(base: str, coded: list[Delta], tmp_path: Path) -> None:
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(base), layer=1)
    bank.add(signature("one", 1), coded[0])
    bank.add(signature("plain", 2), make_delta(base_model(), "plain", 2))
    assert "quantize" not in bank.facts("plain")
    with pytest.raises(
        ValueError, match="one were learned on a 4-bit base, and plain not; name tasks of one"
    ):
        learned_on(bank)
    assert (learned_on(bank, ["one"]), learned_on(bank, ["plain"])) == ("nf4", "none")
    with warnings() as said:
        warn_of_others(bank, "nf4")
    assert "does not say that plain were learned on a 4-bit base" in said[0]


def test_eval_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = DeltaBank.create(tmp_path / "bank", "aaaa", layer=1)
    plain = make_delta(base_model(), "one", 1)
    bank.add(signature("one", 1), replace(plain, mask=plain.mask.with_meta(quantize="nf4")))

    def stop(*_: object) -> None:
        raise AssertionError("a base was made")

    monkeypatch.setattr("trace_dist.stages.evaluate.prepare_base", stop)
    cfg = RunConfig(ModelConfig("m"), [TaskConfig("t", "t.jsonl")], str(tmp_path / "run"))
    with warnings() as said, pytest.raises(AssertionError, match="a base was made"):
        run_evaluate(cfg, str(bank.folder))
    assert "one of the bank" in said[0]
    assert "learned on a 4-bit base" in said[0]
