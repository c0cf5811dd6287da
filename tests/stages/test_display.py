"""What a run shows without a terminal: one line per stage with its result, each warning once."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trace_dist.stages import display as shown
from trace_dist.stages.display import Display
from trace_dist.stages.words import fall, listed
from trace_dist.utils.events import Event


def event(kind: str, text: str, **facts: int) -> Event:
    return {"kind": kind, "text": text, **facts}


def test_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(["probe", "base target"]) as display:
        display.line("base target", "kept")
        display.begin("probe")
        display.show("probe", [event("progress", "probe copy", done=1, total=4)])
        display.show("probe", [event("outcome", "[copy], twist: loss 3.1 -> 0.4")])
        display.end("probe", 43.2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split() for line in lines] == [
        ["base", "target", "kept"],
        ["probe", "[copy],", "twist:", "loss", "3.1", "->", "0.4", "43", "s"],
    ]
    assert lines[0].index("kept") == lines[1].index("[copy]")


def test_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0.0)
    with Display(["probe"]) as display:
        display.begin("probe")
        display.show("probe", [event("progress", "probe copy", done=1, total=4)])
        display.drop("probe")
    assert capsys.readouterr().err.split() == ["probe", "probe", "copy:", "1", "of", "4"]


def test_a_terminal_shows_a_bar_and_keeps_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        shown, "console", Console(file=screen, force_terminal=True, width=120, color_system=None)
    )
    with Display(["probe", "memory"]) as display:
        for name in ("probe", "memory"):
            display.begin(name)
            display.show(name, [event("progress", f"{name} copy", done=1, total=4)])
        display._bars.refresh()
        assert "probe copy" in screen.getvalue()
        assert screen.getvalue().count("1/4") >= 2
        display.show("probe", [event("outcome", "loss 3 -> 1")])
        display.end("probe", 1.0)
        display.drop("memory")
    assert "loss 3 -> 1" in screen.getvalue()


def test_a_warning_of_several_stages_comes_once(caplog: pytest.LogCaptureFixture) -> None:
    with Display(["a", "b"]) as display:
        for name in ("a", "b"):
            display.begin(name)
            display.show(name, [event("warning", "cut 3 prompts")] * 4)
        display.show("b", [event("warning", "cut 4 prompts")])
    assert [record.message for record in caplog.records] == ["a: cut 3 prompts", "b: cut 4 prompts"]


def test_results_in_a_few_words() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdef")) == "6 tasks"
    assert fall([[(1, 3.0), (2, 0.5)], [(1, 2.0), (5, 0.1)], []]) == "loss 2.50 -> 0.30"
    assert fall([[]]) == "no step"
