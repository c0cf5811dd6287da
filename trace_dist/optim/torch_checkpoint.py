"""``torch.distributed.checkpoint`` asks for states of whole parameters; ours are of masked entries, and it is told so.

Its ``get_optimizer_state_dict``, which ``accelerator.save_state`` calls under FSDP2, looks for the parameter of each state in the
model. It would find none of ours, and say no more than the number of the first.
"""

from __future__ import annotations

import sys

CALLER = "torch.distributed.checkpoint.state_dict"
MOST_FRAMES = 4
"""Between it and the optimizer's ``state_dict``: a wrapper's, as accelerate's."""


def refuse_torch_checkpoint() -> None:
    """Raise ValueError where it is what has called the optimizer's ``state_dict``."""
    frame = sys._getframe(1)
    for _ in range(MOST_FRAMES):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_globals.get("__name__") == CALLER:
            raise ValueError(
                "MaskedAdamW: torch.distributed.checkpoint, as accelerator.save_state under FSDP2, keeps states of whole "
                "parameters, and these are of masked entries; save with trace_dist.checkpoint.save_checkpoint on every rank"
            )
