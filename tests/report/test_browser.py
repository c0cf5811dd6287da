"""The page in a real browser: wide and narrow, light and dark, with few and many tasks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.samples import make_results

from trace_dist.report import write_report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")
LEAST_CONTRAST = 4.5
"""WCAG 2.2, success criterion 1.4.3, for text of any size."""
COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "quickstart.json"
LOOK = (Path(__file__).parent / "look.js").read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One process for all pages."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"there is no browser ({', '.join(BROWSERS)}): apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one task, one of three tasks that a run has written, one of twenty tasks with long names."""
    folder = tmp_path_factory.mktemp("pages")
    names = [f"a_family_of_tasks_with_long_names_number_{i}_of_20_in_a_row" for i in range(20)]
    many = make_results(names, num_layers=(24, 32))
    for mode in many["modes"].values():  # charts take long, and seven are enough to fold some away
        mode["losses"] = {name: mode["losses"][name] for name in names[:7]}
    many["masks"] = {model: {names[0]: by_task[names[0]]} for model, by_task in many["masks"].items()}
    results = {"one": make_results(["reverse"]), "three": json.loads(COMMITTED.read_text()), "twenty": many}
    return {name: write_report(found, folder / f"{name}.html") for name, found in results.items()}


@pytest.mark.parametrize("name", ["one", "three", "twenty"])
def test_page_looks_right(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(pages[name].as_uri())
        page.evaluate(LOOK)
        where = f"{name}, {width} px"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, where
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{where}, all unfolded"
        assert page.evaluate("look.outside()") == [], where
        assert page.evaluate("look.unnamed()") == [], where
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate("look.contrasts()")
            assert len(found) > 5, where
            faint = [each for each in found if each["contrast"] < LEAST_CONTRAST]
            assert faint == [], f"{where}, {scheme}"
    page.close()
    assert complaints == []


def test_schemes_differ_and_what_is_measured_is_true(browser: Any, pages: dict[str, Path]) -> None:
    """The measure sees what is faint: in ink of the surface's colour all text is."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.goto(pages["one"].as_uri())
    page.evaluate(LOOK)
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light
    page.add_style_tag(content=":root { --ink: var(--card) }")
    faint = [each["text"] for each in page.evaluate("look.contrasts()") if each["contrast"] < 1.3]
    assert any("learned" in text for text in faint)
    page.add_style_tag(content="main { max-width: none; width: 2000px }")
    assert page.evaluate("document.documentElement.scrollWidth") > 1280
    page.add_style_tag(content="svg text { transform: translateX(500px) }")
    assert page.evaluate("look.outside()") != []
    page.close()


def test_keyboard_reaches_what_opens_and_what_scrolls(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(pages["twenty"].as_uri())
    page.evaluate(LOOK)
    wanted = page.evaluate("look.interactive()")
    reached = set()
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("look.name(document.activeElement)"))
    assert set(wanted) <= reached
    folded = page.query_selector("details:not([open])")
    folded.query_selector("summary").focus()
    page.keyboard.press("Enter")
    assert folded.evaluate("each => each.open")
    scrolled = page.locator("#accuracy .scroll").first
    scrolled.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # it scrolls smoothly
        if scrolled.evaluate("each => each.scrollLeft") > 0:
            break
        page.wait_for_timeout(50)
    assert scrolled.evaluate("each => each.scrollLeft") > 0
    page.close()
