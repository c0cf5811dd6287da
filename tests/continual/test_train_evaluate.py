"""Commands `train` and `eval` on one task, or one model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from continual.small import TASKS, result

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.checkpoint.format import write_manifest
from trace_dist.checkpoint.retention import folder_name
from trace_dist.config import RunConfig
from trace_dist.masks.mask import Mask
from trace_dist.run_folder import RunFolder
from trace_dist.stages.evaluate import run_evaluate
from trace_dist.stages.train import run_train


def test_train_and_eval_commands_reproduce_the_stream(whole: RunConfig) -> None:
    """`train` from the same base, mask and seed gives the delta that the driver put into the bank."""
    path = run_train(whole, TASKS[0], None)
    assert path.read_bytes() == DeltaBank(RunFolder.of(whole.run_dir).bank().root).path(TASKS[0]).read_bytes()
    scores = run_evaluate(whole, str(RunFolder.of(whole.run_dir).bank().root))
    assert [scores[task] for task in TASKS] == pytest.approx(result(whole, "retrieved")["R"][-1])
    plain = run_evaluate(whole, None)
    assert [plain[task] for task in TASKS] == pytest.approx(result(whole, "retrieved")["R"][0])


def test_another_mask_begins_anew(whole: RunConfig) -> None:
    """Nothing of the first training is left that would be continued."""
    cfg = replace(whole, train=replace(whole.train, checkpoint_every=1))
    masks = [cfg.folder.mask(task) for task in TASKS]
    for mask in masks:
        path = run_train(cfg, TASKS[0], str(mask))
        assert Delta.load(path).mask == Mask.load(mask)
        assert not cfg.folder.checkpoints("train", TASKS[0]).exists()
    assert Mask.load(masks[0]) != Mask.load(masks[1])


def test_a_training_that_was_cut_is_not_gone_on_with_on_another_mask(
    whole: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before a base is made, and the checkpoint stays."""
    masks, root = [whole.folder.mask(task) for task in TASKS], whole.folder.checkpoints("train", TASKS[0])
    for step, digest in ((1, Mask.load(masks[1]).digest()), (2, Mask.load(masks[0]).digest())):
        files = {"rank-00000.safetensors": {"sha256": "", "intervals": {}}}
        about = {"kind": "masked", "step": step, "state": {}, "files": files, "mask_digest": digest}
        (root / folder_name(step)).mkdir(parents=True)
        write_manifest(root / folder_name(step), about)

    def refuse(*_: object) -> None:
        raise AssertionError("a base was made")

    monkeypatch.setattr("trace_dist.stages.train.prepare_base", refuse)
    with pytest.raises(ValueError, match=r"step-00000002: the checkpoint is of another mask; resume with"):
        run_train(whole, TASKS[0], str(masks[1]))
    with pytest.raises(AssertionError, match="a base was made"):
        run_train(whole, TASKS[0], str(masks[0]))
    shutil.rmtree(root)


def test_mask_of_another_model_is_refused(whole: RunConfig, tmp_path: Path) -> None:
    mask = Mask.load(RunFolder.of(whole.run_dir).mask(TASKS[0])).with_meta(model="somebody-else")
    mask.save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="somebody-else"):
        run_train(whole, TASKS[0], str(tmp_path / "mask.safetensors"))


def test_unknown_task_is_refused(whole: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"task_name='nope'.*one, two"):
        run_train(whole, "nope", None)
