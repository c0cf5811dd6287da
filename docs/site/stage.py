"""Lay out the pages of the site: ``python docs/site/stage.py OUT``; ``make docs`` calls it.

The README, the changelog and ``docs/`` are read as they stand in the checkout, where their links lead to files. In the site a
link to one of these pages leads to the page; a link to any other file or folder leads to a page that shows it, below ``files/``.
So no link depends on where the sources are hosted. A link that leads nowhere is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SITE = Path("docs/site")
FILES = Path("files")
PAGES = {Path("README.md"): Path("index.md"), Path("CHANGELOG.md"): Path("changelog.md")}
"""Pages outside ``docs/`` -> where they are in the site."""
ASSETS = {".png", ".svg"}
LANGUAGES = {
    ".py": "python",
    ".yaml": "yaml",
    ".json": "json",
    ".sh": "bash",
    ".sbatch": "bash",
    ".cpp": "cpp",
}
_LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)\s]+)(\))")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def pages(root: Path = ROOT) -> dict[Path, Path]:
    """Every page of the checkout -> its place in the site; both relative."""
    found = {page.relative_to(root) for page in (root / "docs").rglob("*.md")}
    own = {page: page.relative_to(SITE) for page in found if page.is_relative_to(SITE)}
    rest = {page: page.relative_to("docs") for page in found - own.keys()}
    return PAGES | own | rest


def stage(out: Path, root: Path = ROOT) -> list[Path]:
    """Write all pages below ``out``, which is emptied first.

    Args:
        out: folder of the pages.
        root: the checkout.

    Returns:
        The files of the checkout that have a page because a link leads to them.

    Raises:
        ValueError: a link leads nowhere, or out of the checkout.
    """
    shutil.rmtree(out, ignore_errors=True)
    known, shown = pages(root), dict[Path, Path]()
    for page, place in known.items():
        text = relinked((root / page).read_text(encoding="utf-8"), page, place, known, shown, root)
        _write(out / place, text)
    for file, place in shown.items():
        _show(root / file, out / place, file)
    return list(shown)


def relinked(
    text: str, page: Path, place: Path, known: dict[Path, Path], shown: dict[Path, Path], root: Path
) -> str:
    """A page's text with its links as they are in the site; files that get a page are added to ``shown``."""

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        path = Path(os.path.normpath(page.parent / target))
        if not (root / path).exists() or path.parts[0] == "..":
            raise ValueError(f"{page}: the link to {match[2]} leads nowhere; mend it")
        if path in known:
            to = known[path]
        elif path.suffix in ASSETS:
            to = shown.setdefault(path, path.relative_to("docs"))
        else:
            for each in _with_children(root / path):
                file = each.relative_to(root)
                shown.setdefault(file, FILES / file.parent / f"{file.name}.md")
            to = shown[path]
        shared = os.path.relpath(to, place.parent)
        return f"{match[1]}{shared}{'#' + anchor if anchor else ''}{match[3]}"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def _with_children(path: Path) -> Iterator[Path]:
    """A file, or a folder and the files directly in it."""
    yield path
    if path.is_dir():
        yield from (child for child in sorted(path.iterdir()) if child.is_file())


def _show(file: Path, place: Path, name: Path) -> None:
    """Write the page of a file or a folder; a picture is copied."""
    if file.suffix in ASSETS:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    elif file.is_dir():
        rows = [
            f"- [{each.name}]({name.name}/{each.name}.md)" for each in _with_children(file) if each != file
        ]
        _write(place, f"# {name}\n\n" + "\n".join(rows) + "\n")
    else:
        text = file.read_text(encoding="utf-8").rstrip()
        fence = "`" * 4
        _write(place, f"# {name}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}\n")


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
