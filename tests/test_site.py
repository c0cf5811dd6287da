"""The documentation as a site: all links lead somewhere, all pages are listed, and a strict build has no complaint."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import trace_dist

ROOT = Path(__file__).parents[1]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


@pytest.fixture(scope="module")
def stage() -> ModuleType:
    """The script that lays the pages out."""
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs/site/stage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_navigation(entries: list[Any]) -> Iterator[str]:
    """The pages that a navigation lists."""
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from in_navigation(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once(stage: ModuleType) -> None:
    listed = list(in_navigation(CONFIG["nav"]))
    assert sorted(listed) == sorted(str(place) for place in stage.pages().values())


def test_links_lead_to_pages_and_to_files(stage: ModuleType, tmp_path: Path) -> None:
    """In the checkout's own pages all do; what is not a page becomes one, and what is not there is an error."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text(
        "[a](docs/a.md#x) [b](code/b.py) ![c](docs/c.png)\n```\n[kept](as it is)\n```\n"
    )
    (tmp_path / "CHANGELOG.md").write_text("")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/b.py").write_text("b = '```'\n")
    (docs / "c.png").write_bytes(b"picture")
    (docs / "a.md").write_text("[up](../README.md) [`code`](../code) [out](https://example.org) [here](#x)")
    shown = stage.stage(tmp_path / "out", tmp_path)
    assert sorted(map(str, shown)) == ["code", "code/b.py", "docs/c.png"]
    out = tmp_path / "out"
    assert (out / "index.md").read_text() == (
        "[a](a.md#x) [b](files/code/b.py.md) ![c](c.png)\n```\n[kept](as it is)\n```\n"
    )
    assert (
        out / "a.md"
    ).read_text() == "[up](index.md) [`code`](files/code.md) [out](https://example.org) [here](#x)"
    assert "[b.py](code/b.py.md)" in (out / "files/code.md").read_text()
    assert (out / "files/code/b.py.md").read_text() == "# code/b.py\n\n````python\nb = '```'\n````\n"
    assert (out / "c.png").read_bytes() == b"picture"
    (docs / "a.md").write_text("[gone](b.md)")
    with pytest.raises(ValueError, match=r"docs/a\.md: the link to b\.md leads nowhere; mend it"):
        stage.stage(tmp_path / "out", tmp_path)


@pytest.fixture(scope="module")
def site(stage: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built as `make docs` does, elsewhere."""
    if find_spec("zensical") is None:
        pytest.skip("needs the extra docs (pip install -e '.[docs]'), which make test installs")
    folder = tmp_path_factory.mktemp("site")
    stage.stage(folder / "pages")
    (handler,) = [
        entry["mkdocstrings"]["handlers"]["python"] for entry in CONFIG["plugins"] if "mkdocstrings" in entry
    ]
    sources = {"paths": [str(ROOT / path) for path in handler["paths"]]}
    plugins = ["search", {"mkdocstrings": {"handlers": {"python": handler | sources}}}]
    places = {"docs_dir": "pages", "site_dir": "site", "plugins": plugins}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(CONFIG | places))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_the_site_is_built_strictly(site: Path) -> None:
    for page in in_navigation(CONFIG["nav"]):
        place = Path(page).parent if Path(page).name == "index.md" else Path(page).with_suffix("")
        assert (site / place / "index.html").is_file(), page


def test_the_interface_is_on_its_page(site: Path) -> None:
    """All that the package exports, with its docstring and, of a class, its methods."""
    page = (site / "api/index.html").read_text(encoding="utf-8")
    homes = {f"trace_dist.{home}.{name}" for name, home in trace_dist._HOMES.items()}
    assert homes <= set(re.findall(r'id="([\w.]+)"', page))
    for text in ("A uniformly random mask", "One update from the accumulated gradients", "Raises:"):
        assert text in page
    assert "trace_dist.config.train.TrainConfig.lr" in (site / "api/configuration/index.html").read_text()
