"""Every task is trained from the base and kept as a delta; at test time each input retrieves its own."""

from __future__ import annotations

label, colour, masked, on_ranks = "retrieved", "blue", True, True
