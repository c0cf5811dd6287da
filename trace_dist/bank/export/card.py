"""What an exported folder says of itself, in ``trace_dist.json``: tasks, base model, and the checksum of every file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_dist.bank.delta import Delta
from trace_dist.bank.export.together import Composed
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.rest import CARD
from trace_dist.utils.files import sha256
from trace_dist.utils.sealed import write_record


def write_card(
    folder: Path,
    kind: str,
    deltas: Sequence[Delta],
    base: str,
    dtype: str,
    options: Composed,
    **facts: Any,
) -> None:
    """Write the card of a folder whose other files are complete.

    Args:
        folder: the folder.
        kind: name of the exporter.
        deltas: what it was given.
        base: folder or hub id of the base model.
        dtype: of the weights.
        options: how several deltas became one.
        facts: what the exporter has to say beside that; JSON values.
    """
    models = (delta.mask.meta.get("model") for delta in deltas)
    known = next((str(model) for model in models if model is not None), None)
    codes = {delta.mask.meta["quantize"] for delta in deltas if "quantize" in delta.mask.meta}
    write_record(
        folder / CARD,
        {
            "format": "trace_dist.export",
            "version": 1,
            "kind": kind,
            "tasks": [delta.task for delta in deltas],
            "composition": options.composition if len(deltas) > 1 else None,
            "masks": [delta.mask.digest() for delta in deltas],
            "base": {"path": base, "fingerprint": known or fingerprint(base)},
            **({"learned_on": "+".join(sorted(codes))} if codes else {}),
            "dtype": dtype,
            **facts,
            "files": {
                str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            },
        },
    )
