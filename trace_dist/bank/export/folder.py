"""The folder that an export fills: what an earlier export left there goes, and a model that came otherwise is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trace_dist.models.rest import CARD
from trace_dist.utils.files import filled_folder
from trace_dist.utils.sealed import read_record

_MODEL = ("*.safetensors", "*.index.json", "pytorch_model*.bin", "adapter_config.json", "adapter_model.*")
"""Files that loaders find by themselves, beside those that a new export writes."""


def replaced(out: Path) -> list[str]:
    """Files of an earlier export in a folder, which a new one replaces.

    Raises:
        ValueError: the folder holds files of a model that no export wrote, or the earlier one's card is damaged.
    """
    earlier = _listed(out)
    foreign = sorted({file.name for pattern in _MODEL for file in out.glob(pattern)} - set(earlier))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"out={str(out)!r}: holds {', '.join(foreign[:3])}{more}, which no export wrote, and which would be read with the "
            "new files or in their place; choose another folder, or delete them"
        )
    return earlier


def _listed(out: Path) -> list[str]:
    """What the card of an earlier export names."""
    if not (out / CARD).is_file():
        return []
    files = read_record(out / CARD, "choose another folder").get("files")
    place = out.resolve()
    return [name for name in files or () if place in (out / name).resolve().parents]


@contextmanager
def exported_folder(out: Path) -> Iterator[Path]:
    """As ``filled_folder``, without what an earlier export left. Raises ValueError as ``replaced``, and as ``writing``."""
    with filled_folder(out, replaced(out)) as folder:
        yield folder
