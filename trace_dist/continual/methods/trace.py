"""``trace``: TRACE as its authors' code has it (arXiv 2605.31025): whole tensors, chosen by the proxy's warm start.

    importance(tensor)  = 1/2 minmax(rms of the update) + 1/2 minmax(mean squared gradient after it),   highest first
    specificity(tensor) = mean over the other tasks of the signed cosine of the updates in the tensor,  lowest first

Min and max are over all tensors. A share of the tensors *by count* is taken, and trained from the base; answers are those of
``retrieved``. The warm start is the run's probe, so that this method and the others look at the same evidence; it trains what
``mask.maskable`` covers: ``all`` is TRACE's own. A tensor of the target has the score of the proxy's tensors of its role at its
relative depth. Updates are compared by their sketches, one at a time, exact in tensors of up to 1,024 elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from trace_dist.bank.sketch import Sketch
from trace_dist.config import MaskConfig, RunConfig
from trace_dist.config.checks import check
from trace_dist.continual.earlier import check_room
from trace_dist.continual.masks import probed_file
from trace_dist.continual.methods import retrieved
from trace_dist.continual.setting import Recipe, Setting
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for
from trace_dist.masks.select import Units
from trace_dist.probe.specificity import mean_cosines
from trace_dist.probe.task import Tensors
from trace_dist.projection.project import project_tensors
from trace_dist.train.workbench import Stream
from trace_dist.utils.together import on_all


@dataclass(frozen=True)
class Options(retrieved.Options):
    """Of ``trace``: ``lr`` as of ``retrieved``, and how tensors are chosen."""

    section: ClassVar[str] = "continual.options.trace"

    share: float = 0.10
    """Share of the maskable tensors that are trained, by count, in (0, 1]."""
    select: Literal["importance", "specificity"] = "importance"
    """By importance, or by specificity, which needs two tasks at least; TRACE takes 0.05, 0.15 or 0.2 of the tensors then."""

    def check(self) -> None:
        super().check()
        inside = 0 < self.share <= 1
        check(inside, f"{self.where}.share", self.share, "must lie in (0, 1]", "use for example 0.1")


class Trace(retrieved.Retrieved):
    """A bank of deltas on whole tensors."""

    label = "TRACE"
    colour = "amber"
    own_masks = True
    reads_probe = True

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        super().__init__(name, setting, options)
        self._recipe = Recipe(name, f"trace/{options.select}/{options.share:g}", self._choose)

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        rule = f"continual.methods={name!r} compares updates of a warm start, and there is none"
        check(cfg.probe.num_steps(1) > 0, "probe.steps", cfg.probe.steps, rule, "raise it")
        select = cfg.continual.options.get(name, {}).get("select")
        rule = f"{select} compares tasks, and there is one"
        cure = "add a task, or choose by importance"
        few = select == "specificity" and len(cfg.tasks) < 2
        check(not few, f"continual.options.{name}.select", select, rule, cure)

    def mask(self, stream: Stream) -> Mask:
        return self.setting.own_mask(stream, self._recipe)

    def _choose(self, stream: Stream, refused: Units) -> Mask:
        """The best tensors that are not refused. Collective."""
        setting, task = self.setting, stream.task.name
        mask: MaskConfig = replace(
            setting.cfg.mask,
            granularity="tensor",
            share_of="tensors",
            density=self.options.share,
            scope="model",
            floor=0.0,
            cap=1.0,
        )
        layouts = layouts_for(setting.model, mask.granularity, mask.block, mask.maskable)
        check_room(layouts, mask.share, refused, task, mask.isolation, mask.share_of)
        tensors = on_all(lambda: self._tensors(task))
        return project_tensors(setting.model, tensors.scores, tensors.shapes, mask, refused)

    def _tensors(self, task: str) -> Tensors:
        """The proxy's tensors with the scores that choose, the highest first."""
        folder = self.setting.folder
        tensors = Tensors.load(probed_file(folder.trace(task)))
        if self.options.select == "importance":
            return tensors
        own = Sketch.load(probed_file(folder.sketch(task)))
        cosines = mean_cosines(own, self._others(task))
        return replace(tensors, scores={name: -cosine for name, cosine in cosines.items()})

    def _others(self, task: str) -> Iterator[Sketch]:
        """Sketches of the run's other tasks, one at a time."""
        for stream in self.setting.bench.tasks:
            if stream.task.name != task:
                yield Sketch.load(probed_file(self.setting.folder.sketch(stream.task.name)))


METHOD = Trace
