"""Stage ``base``: the base models of a run, found or made on the spot.

A tiny Llama is pretrained on the general tasks, a tiny vision transformer on other images (stages/vit.py); a GGUF file is
converted; a proxy is cut out of the target, in depth or width, and healed on the general tasks. A base is made once: a folder
that exists is used as it is.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from transformers import PreTrainedModel

from trace_dist.config import ModelConfig, PruneConfig, RunConfig, TinyConfig
from trace_dist.models.gguf import convert_gguf
from trace_dist.models.loading import load_model
from trace_dist.models.origin import Origin
from trace_dist.models.prune import prune
from trace_dist.models.rest import copy_rest
from trace_dist.models.tiny import build_tiny
from trace_dist.models.width import Widths
from trace_dist.stages.stage import ALONE, Stage
from trace_dist.stages.vit import make_vit
from trace_dist.stages.words import fall
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.workbench import Tasks, Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import atomic_folder
from trace_dist.utils.locks import hold
from trace_dist.utils.log import outcome

Role = Literal["target", "proxy"]


def describe(cfg: RunConfig, role: Role) -> Stage:
    """Make one base model; nothing is left to do for a model that is not made here."""
    model = _model(cfg, role)
    outputs = [Path(model.path) / "config.json"] if model.made else []
    return Stage(f"base {role}", ["base", "--which", role, *ALONE], outputs)


def run_base(cfg: RunConfig, which: str | None) -> None:
    """Make the base models that are not there; both when ``which`` is None.

    Raises:
        ValueError: no such role, or a base cannot be made.
    """
    if which not in (None, "target", "proxy"):
        raise ValueError(f"which={which!r}: must be target or proxy; leave it out for both")
    roles: tuple[Role, ...] = ("target", "proxy")
    for role in roles:
        if which in (None, role) and (role == "target" or cfg.proxy is not None):
            prepare_base(cfg, role)


def prepare_base(cfg: RunConfig, role: Role) -> Path | str:
    """Make a base model unless it is there.

    Args:
        cfg: the run.
        role: ``target``, or ``proxy`` (the target itself where a run has none).

    Returns:
        Folder or hub id to load it from.

    Raises:
        ValueError: the base must be made, which one process does, but several ranks were started.
    """
    model = _model(cfg, role)
    folder = Path(model.path)
    if (folder / "config.json").is_file():
        return folder
    if model.made and dist.world_size() > 1:
        raise ValueError(
            f"{role}.path={model.path!r}: the base model is not there yet, and one process makes it, not "
            f"{dist.world_size()} ranks; start `trace-dist base --config ...` without a launcher first"
        )
    if not model.made:
        return model.path
    with hold(folder.with_name(f".{folder.name}.lock"), f"{role}.path={model.path!r}", wait=True):
        # Another run may have made it meanwhile.
        if not (folder / "config.json").is_file():
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
            _make(model, cfg, folder, role)
    return folder


def _make(model: ModelConfig, cfg: RunConfig, folder: Path, role: Role) -> None:
    if model.tiny is not None:
        _make_tiny(model.tiny, cfg, folder, role)
    elif model.vit is not None:
        make_vit(model.vit, cfg, folder, role)
    elif model.gguf is not None:
        # Its checks come before the conversion.
        Tasks.load(cfg)
        convert_gguf(model.gguf, folder)
        outcome(f"{role}: converted from {model.gguf}")
    elif model.prune is not None:
        _make_pruned(model.prune, cfg, folder)


def _model(cfg: RunConfig, role: Role) -> ModelConfig:
    return cfg.target if role == "target" else cfg.probed


def _make_tiny(tiny: TinyConfig, cfg: RunConfig, folder: Path, role: Role) -> None:
    if not cfg.general:
        raise ValueError(
            f"{role}.tiny: a tiny base is pretrained on the general tasks, but there are none; add some to general"
        )
    tokenizer = Tasks.load(cfg).characters()
    module = build_tiny(tiny, len(tokenizer), cfg.seed)
    with atomic_folder(folder) as partial:
        tokenizer.save_pretrained(partial)
        module.save_pretrained(partial)
        _pretrain(module, partial, cfg, tiny.steps, tiny.lr, tiny.batch_size, f"{role}.tiny.lr")
        module.save_pretrained(partial)


def _make_pruned(given: PruneConfig, cfg: RunConfig, folder: Path) -> None:
    if given.heal_steps and not cfg.general:
        raise ValueError(
            "proxy.prune.heal_steps: healing needs general tasks, but there are none; add some, or use 0"
        )
    widths = Widths(given.keep_hidden, given.keep_heads, given.keep_intermediate)
    target = Path(prepare_base(cfg, "target"))
    # Its checks come before the cut.
    Tasks.load(cfg)
    if not given.heal_steps:
        prune(target, folder, given.layers, widths)
        outcome(f"proxy: cut out of {target}")
        return
    # The folder comes first: where it cannot be, nothing is healed in vain.
    with atomic_folder(folder) as partial, TemporaryDirectory(dir=folder.parent) as scratch:
        pruned = Path(scratch) / "pruned"
        prune(target, pruned, given.layers, widths)
        module = load_model(pruned, torch.float32)
        _pretrain(
            module, pruned, cfg, given.heal_steps, given.heal_lr, cfg.train.batch_size, "proxy.prune.heal_lr"
        )
        copy_rest(pruned, partial)
        module.save_pretrained(partial)
        origin = Origin.load(pruned)
        if origin is None:
            raise AssertionError(f"{pruned}: was cut out of {target}, but does not say what was kept")
        origin.save(partial)


def _pretrain(
    module: PreTrainedModel,
    tokenizer_folder: Path,
    cfg: RunConfig,
    steps: int,
    lr: float,
    batch_size: int,
    rate: str,
) -> None:
    """Train a base on the general tasks, in one process; reads all tasks first, so that one too long fails at once.

    ``rate`` is the field that sets the learning rate; it begins with the role.
    """
    role = rate.partition(".")[0]
    bench = Workbench.load(cfg, tokenizer_folder)
    learner = DenseLearner(module, module.parameters(), cfg.train, lr=lr)
    log = MetricLog(cfg.folder, f"base/{role}", cfg.train.trackers)
    batches = bench.batches(bench.general, batch_size)
    label = f"pretrain {role}"
    result = train_steps(learner, batches, cfg.train, steps, description=label, rate=rate, log=log)
    log.close()
    outcome(f"{label}: {fall([result.losses])}")
