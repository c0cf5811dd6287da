"""The groups of an optimizer whose parameters are entries of a mask."""

from __future__ import annotations

from typing import Any


class Groups(list[dict[str, Any]]):
    """Groups that stay as they are.

    ``deepspeed.initialize(optimizer=...)`` writes a list of its own into them first of all, and would then shard, clip and step
    the entries as if they were a model's parameters.
    """

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            raise ValueError(
                "param_groups: MaskedAdamW's are entries of its mask, and nobody else can step them; call deepspeed.initialize "
                "without an optimizer, and build MaskedAdamW(engine, mask) of the engine that it gives"
            )
        super().__setitem__(index, value)
