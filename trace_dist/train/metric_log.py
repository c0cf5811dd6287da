"""Where the scalars of a training go: metrics.jsonl always, and the trackers that ``train.trackers`` names.

TensorBoard is written by torch's writer. The others are accelerate's (``accelerate.tracking``), by the names that it has for
them; a name with a dot is a class of one's own, a ``GeneralTracker`` as accelerate describes it. A tracker that fails while it
logs is left out from then on, with a warning: a training does not end because a server of somebody else's does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trace_dist.run_folder import RunFolder
from trace_dist.utils import dist
from trace_dist.utils.files import append_jsonl, writing
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
TENSORBOARD = "tensorboard"
PACKAGES = {
    TENSORBOARD: "tensorboard",
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Tracker -> the package that it needs, for import and for pip alike."""
RUN_NAMES = {
    "clearml": "task_name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "trackio": "name",
    "wandb": "name",
}
"""Trackers that tell runs of one project apart -> how they call a run's name."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError where a tracker does not exist, or its package is not installed."""
    for name in names:
        if "." in name:
            _own(name)
        elif name not in PACKAGES:
            raise ValueError(
                f"train.trackers={name!r}: there is no such tracker; choose among {', '.join(PACKAGES)}, or give the path of a "
                "class of your own"
            )
        elif find_spec(PACKAGES[name]) is None:
            raise ValueError(
                f"train.trackers={name!r}: its package is not installed; pip install {PACKAGES[name]}"
            )


def _own(path: str) -> Any:
    """The tracker class of a path. Raises ValueError where there is none."""
    from accelerate.tracking import GeneralTracker

    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"train.trackers={path!r}: cannot be imported ({error}); check the path and PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, GeneralTracker)):
        raise ValueError(
            f"train.trackers={path!r}: is no accelerate.tracking.GeneralTracker; derive one from that"
        )
    return found


class _TensorBoard:
    """Files of TensorBoard, by torch's writer."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with writing(folder):
            self._writer: Any = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        with writing(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        with writing(self._folder):
            self._writer.close()


class MetricLog:
    """Scalars of one training, on rank 0.

    Args:
        folder: the run's.
        tag: names the training, such as ``retrieved/reverse``.
        trackers: who is told beside metrics.jsonl.
    """

    def __init__(self, folder: RunFolder, tag: str, trackers: Sequence[str] = (TENSORBOARD,)) -> None:
        self.folder, self.tag, self._names = folder, tag, tuple(dict.fromkeys(trackers))
        self._trackers: dict[str, Any] | None = None

    def write(self, step: int, values: dict[str, float], beside: Mapping[str, Any] | None = None) -> None:
        """Record scalars at a step; what is ``beside`` them, JSON-ready, goes to metrics.jsonl alone."""
        if not dist.is_main():
            return
        append_jsonl(self.folder.metrics, {"tag": self.tag, "step": step, **values, **(beside or {})})
        if self._trackers is None:
            self._trackers = {name: self._start(name) for name in self._names}
        for name in list(self._trackers):
            self._told(name, "log", values, step=step)

    def close(self) -> None:
        """End what was begun."""
        for name in list(self._trackers or ()):
            self._told(name, "finish")
        self._trackers = None

    def _start(self, name: str) -> Any:
        if name == TENSORBOARD:
            return _TensorBoard(self.folder.tensorboard(self.tag))
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        # Trackers of accelerate cannot log without it.
        PartialState()
        kind = _own(name) if "." in name else LOGGER_TYPE_TO_CLASS[name]
        project = self.folder.root.absolute().name
        options = {RUN_NAMES[name]: self.tag} if name in RUN_NAMES else {}
        place = [str(self.folder.root / "trackers")] if kind.requires_logging_directory else []
        try:
            tracker = kind(project if options else f"{project}/{self.tag}", *place, **options)
            tracker.start()
        # Each is a client of a service of its own.
        except Exception as error:
            raise ValueError(
                f"train.trackers={name!r}: cannot be started ({type(error).__name__}: {error}); see to it, or leave it out"
            ) from error
        return tracker

    def _told(self, name: str, what: str, *arguments: Any, **options: Any) -> None:
        assert self._trackers is not None
        try:
            getattr(self._trackers[name], what)(*arguments, **options)
        except Exception as error:
            if name == TENSORBOARD:
                raise
            del self._trackers[name]
            logger.warning(
                "train.trackers=%r: failed (%s: %s); it is told no more", name, type(error).__name__, error
            )
