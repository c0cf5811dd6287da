"""The one-way layers of the design: a module imports only from its own layer or from below."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trace_dist"
KERNELS = ROOT / "kernels" / "trace_kernels"

# (layer, place inside the layer): masks are made from models, and projections read a sharded model.
RANKS: dict[str, tuple[int, int]] = {
    "utils": (0, 0),
    "parts": (1, 0),
    "run_folder": (1, 0),
    "config": (1, 1),
    "launching": (1, 2),
    "models": (2, 0),
    "data": (2, 1),
    "evaluation": (2, 2),
    "masks": (2, 2),
    "sharding": (3, 0),
    "optim": (4, 0),
    "bank": (4, 0),
    "checkpoint": (4, 1),
    "train": (5, 0),
    "modality": (5, 1),
    "profiling": (5, 1),
    "serving": (5, 2),
    "probe": (6, 0),
    "projection": (6, 1),
    "continual": (7, 0),
    "report": (7, 1),
    "benchmarks": (8, 0),
    "stages": (8, 1),
    "studies": (8, 2),
    "cli": (9, 0),
}
ENTRY_POINTS = {"__init__", "__main__"}
"""Modules at the top of the package: they may import anything, and no module imports them."""
DEEPSPEED_HOMES = {
    *("sharding/zero3.py", "models/loading.py", "benchmarks/peers.py"),
    "profiling/simulation/rank.py",  # the accelerator below it
}


def source_of(node: ast.ImportFrom, package: str) -> str:
    """The module that ``from ... import`` names, in full."""
    up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    return ".".join([*up, *([node.module] if node.module else [])])


def imports(tree: ast.AST, package: str = "", lazy: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, line, inside a function) of every import, wherever it stands in the file, and for types alone too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = source_of(node, package)
            yield base, node.lineno, lazy
            # `from trace_dist import cli` names a module too.
            yield from ((f"{base}.{alias.name}", node.lineno, lazy) for alias in node.names)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(node, package, inside)


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return list(imports(ast.parse(path.read_text(encoding="utf-8")), package))


def module_of(path: Path, root: Path = ROOT) -> str:
    """``trace_dist/masks/__init__.py`` -> ``trace_dist.masks``."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imported_files(tree: ast.AST, package: str, files: Collection[str]) -> set[str]:
    """Which of ``files`` are imported, anywhere and for types alone too; of ``from a import b`` the file a.b, if there is one."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = source_of(node, package)
            names = (f"{base}.{alias.name}" for alias in node.names)
            found.update(name if name in files else base for name in names)
    return found.intersection(files)


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Files that import each other in a circle, the first of them again at the end; none when there is no circle."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def part_of(module: str) -> str:
    """``trace_dist.masks.ops`` -> ``masks``."""
    return module.split(".")[1]


def upward(path: Path) -> list[str]:
    """Imports of a file that go up."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    found = []
    for module, line, _ in imports_of(path):
        if not module.startswith("trace_dist.") or part_of(module) == part:
            continue
        if RANKS.get(part_of(module), (99, 0)) >= RANKS[part]:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return found


def sources() -> list[Path]:
    return sorted(
        path for path in PACKAGE.rglob("*.py") if not (path.parent == PACKAGE and path.stem in ENTRY_POINTS)
    )


def test_every_part_has_a_layer() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in sources()}
    assert parts == set(RANKS)


def test_imports_go_down() -> None:
    assert [line for path in sources() for line in upward(path)] == []


def edges_of(root: Path, paths: Collection[Path]) -> dict[str, set[str]]:
    """File -> the others that it imports; both are named as seen from a folder."""
    files = {module_of(path, root): path for path in paths}
    return {
        module: imported_files(
            ast.parse(path.read_text(encoding="utf-8")), ".".join(path.relative_to(root).parent.parts), files
        )
        for module, path in files.items()
    }


@pytest.mark.parametrize("package", [PACKAGE, KERNELS], ids=lambda package: package.name)
def test_no_files_import_each_other_in_a_circle(package: Path) -> None:
    paths = sources() if package == PACKAGE else sorted(package.rglob("*.py"))
    edges = edges_of(package.parent, paths)
    assert any(edges.values())
    assert circle(edges) == []


@pytest.mark.parametrize(
    "back",
    [
        "from trace_dist.room.a import A",
        "from trace_dist.room import a",
        "from . import a",
        "def f():\n    import trace_dist.room.a",
        "if TYPE_CHECKING:\n    from trace_dist.room.a import A",
    ],
)
def test_a_circle_is_found_however_it_is_imported(back: str) -> None:
    sources = {"trace_dist.room.a": "from trace_dist.room.b import B", "trace_dist.room.b": back}
    edges = {
        name: imported_files(ast.parse(source), "trace_dist.room", sources)
        for name, source in sources.items()
    }
    assert set(circle(edges)) == set(sources)


def test_the_page_shows_the_layers() -> None:
    """The table in docs/how-it-works.md names every room in the layer that the test puts it into."""
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
    shown = {int(layer): set(re.findall(r"`(\w+)`", rooms)) for layer, rooms in rows}
    layers: dict[int, set[str]] = {}
    for room, (layer, _) in RANKS.items():
        layers.setdefault(layer, set()).add(room)
    assert shown == layers


def test_the_whole_configuration_goes_to_stages_alone() -> None:
    """Everything below takes its section, or plain arguments."""
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"Only (.*?) take the whole configuration", page)
    named = set(re.findall(r"`(\w+)`", sentence))
    assert named < RANKS.keys()
    above = {"config"} | named
    found = {module_of(path) for path in sources() if "RunConfig" in path.read_text(encoding="utf-8")}
    assert {module for module in found if part_of(module) not in above} == set()


def test_nothing_imports_the_entry_points() -> None:
    """``from trace_dist import Mask`` inside the package would go through its top."""
    names = {"Mask", "MaskedAdamW", "Delta", "DeltaBank", "Router", "shard", "load_sharded"}
    forbidden = {"trace_dist.__main__", *(f"trace_dist.{name}" for name in names)}
    found = [(path.name, module) for path in sources() for module, _, _ in imports_of(path)]
    assert [pair for pair in found if pair[1] in forbidden] == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import trace_dist.cli.main", "trace_dist.cli.main"),
        ("def f():\n    from trace_dist import cli", "trace_dist.cli"),
        ("if True:\n    from ..cli import main", "trace_dist.cli.main"),
        ("try:\n    from trace_dist.cli import main\nexcept ImportError:\n    pass", "trace_dist.cli"),
        ("class A:\n    def f(self):\n        import trace_dist.cli", "trace_dist.cli"),
        ("if TYPE_CHECKING:\n    from trace_dist.cli.main import main", "trace_dist.cli.main"),
    ],
)
def test_the_scan_sees_imports_everywhere(source: str, module: str) -> None:
    assert module in [name for name, _, _ in imports(ast.parse(source), "trace_dist.masks")]


def test_deepspeed_is_imported_in_one_adapter_and_lazily() -> None:
    homes = set()
    for path in sources():
        for module, line, lazy in imports_of(path):
            if module.split(".")[0] == "deepspeed":
                assert lazy, f"{path.relative_to(ROOT)}:{line}: deepspeed is imported at the top of the file"
                homes.add(path.relative_to(PACKAGE).as_posix())
    assert homes == DEEPSPEED_HOMES


def test_kernels_need_torch_and_triton_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "trace_kernels"}
    for path in sorted(KERNELS.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {module.split(".")[0] for module, _, _ in imports(tree, "trace_kernels")}
        assert roots <= allowed, f"{path.name} imports {sorted(roots - allowed)}"


def test_the_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
