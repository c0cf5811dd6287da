"""What earlier releases wrote into files beside a mask."""

from __future__ import annotations

import hashlib

from trace_dist.masks import Mask


def earlier_digest(mask: Mask) -> str:
    """SHA-256 over names, layouts and indices, as int64; of units that are contiguous."""
    digest = hashlib.sha256(mask.granularity.encode())
    for name in sorted(mask.units):
        layout = mask.layouts[name]
        digest.update(f"{name}{layout.shape}{layout.unit}".encode())
        digest.update(mask.units[name].long().numpy().tobytes())
    return digest.hexdigest()
