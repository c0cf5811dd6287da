"""As retrieved, with random masks of the same density."""

from __future__ import annotations

label, colour, masked, on_ranks = "random mask", "grey", True, True
