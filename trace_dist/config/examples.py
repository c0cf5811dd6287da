"""Configurations and data that come with the package, named ``example:<name>`` wherever a file is asked for.

``--config example:words`` is the configuration ``words.yaml`` of the folder ``trace_dist/examples``, and the path
``example:vowels.jsonl`` of a task is the file of that name there. So an installed package runs without a checkout.
"""

from __future__ import annotations

from pathlib import Path

from trace_dist.utils.home import from_home

SCHEME = "example:"
FOLDER = Path(__file__).parents[1] / "examples"


def example_config(source: str) -> str:
    """The configuration that ``example:<name>`` stands for; any other text is itself.

    Raises:
        ValueError: no example has this name.
    """
    name = source.removeprefix(SCHEME)
    return source if name == source else str(_found(f"{name}.yaml", "config", source, ".yaml"))


def example_file(source: str, field: str) -> Path:
    """The file that ``example:<file>`` stands for, else the path itself with ``~`` resolved.

    Args:
        source: as it stands in a configuration.
        field: what errors call it.

    Raises:
        ValueError: no file of the examples has this name.
    """
    name = source.removeprefix(SCHEME)
    return from_home(source) if name == source else _found(name, field, source, ".jsonl")


def _found(name: str, field: str, source: str, suffix: str) -> Path:
    files = {path.name: path for path in FOLDER.glob(f"*{suffix}")}
    if name not in files:
        shown = [SCHEME + (path.stem if suffix == ".yaml" else path.name) for path in sorted(files.values())]
        raise ValueError(f"{field}={source!r}: there is no such example; choose one of {', '.join(shown)}")
    return files[name]
