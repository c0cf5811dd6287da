"""Scalars go to metrics.jsonl and to every tracker that is named; a tracker that fails does not end a training."""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trace_dist.run_folder import RunFolder
from trace_dist.train.metric_log import PACKAGES, MetricLog, check_trackers

OWN = """
import json
from pathlib import Path

from accelerate.tracking import GeneralTracker


class Lines(GeneralTracker):
    name = "lines"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir):
        super().__init__()
        Path(logging_dir).mkdir(exist_ok=True)
        self.file = (Path(logging_dir) / "lines.jsonl").open("a")
        self.told("begin", run_name)

    @property
    def tracker(self):
        return self.file

    def told(self, *what):
        self.file.write(json.dumps(what) + "\\n")

    def log(self, values, step=None, **kwargs):
        if values["loss"] == 0.25 and step == 2:
            raise ConnectionError("the service is away")
        self.told(step, values)

    def finish(self):
        self.told("end")
        self.file.close()


class Absent(Lines):
    def start(self):
        raise PermissionError("no key")


class Nothing:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    (tmp_path / "own_trackers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "myrun").mkdir()
    return RunFolder(tmp_path / "myrun")


def told(folder: RunFolder) -> list[list[object]]:
    return [json.loads(line) for line in (folder.root / "trackers/lines.jsonl").read_text().splitlines()]


def test_all_are_told(folder: RunFolder) -> None:
    log = MetricLog(folder, "full/copy", ("tensorboard", "own_trackers.Lines"))
    for step, loss in ((1, 0.5), (2, 0.125)):
        log.write(step, {"loss": loss, "lr": 1e-3})
    log.close()
    records = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert records[1] == {"tag": "full/copy", "step": 2, "loss": 0.125, "lr": 1e-3}
    assert told(folder) == [
        ["begin", "myrun/full/copy"],
        [1, {"loss": 0.5, "lr": 1e-3}],
        [2, {"loss": 0.125, "lr": 1e-3}],
        ["end"],
    ]
    events = EventAccumulator(str(folder.tensorboard("full/copy"))).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 0.5), (2, 0.125)]


def test_one_that_fails_is_left_out(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(folder, "t", ("own_trackers.Lines",))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            log.write(step, {"loss": 0.25})
        log.close()
    assert (
        "'own_trackers.Lines': failed (ConnectionError: the service is away); it is told no more"
        in caplog.text
    )
    assert len(folder.metrics.read_text().splitlines()) == 3
    assert not folder.tensorboard("t").exists()
    with pytest.raises(ValueError, match="Absent': cannot be started \\(PermissionError: no key\\)"):
        MetricLog(folder, "t", ("own_trackers.Absent",)).write(1, {"loss": 1.0})


def test_names_are_checked_first(folder: RunFolder) -> None:
    check_trackers(["tensorboard", "own_trackers.Lines"])
    absent = next(name for name, package in PACKAGES.items() if find_spec(package) is None)
    for name, words in (
        (absent, f"its package is not installed; pip install {PACKAGES[absent]}"),
        ("tensorbord", "there is no such tracker; choose among tensorboard, aim"),
        ("own_trackers.Missing", "cannot be imported"),
        ("own.Missing", "cannot be imported"),
        ("own_trackers.Nothing", "is no accelerate.tracking.GeneralTracker"),
    ):
        with pytest.raises(ValueError, match=words):
            check_trackers([name])


def test_the_names_are_those_of_accelerate() -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(PACKAGES) == set(LOGGER_TYPE_TO_CLASS)
