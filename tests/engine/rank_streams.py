"""ZeRO-3 on an accelerator with two streams that have names: when shards are written, gathered and waited for.

On a CPU there is one stream; the installed DeepSpeed decides on which of the two it gathers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine.cases import CASES, batches
from engine.fake_gpu import Streams

from trace_dist import MaskedAdamW
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.checkpoint import load_checkpoint, save_checkpoint
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.zero3 import Zero3Model, load_deepspeed

CASE = CASES["element"]
IDS = batches(CASE)[0][0]


def build(streams: Streams) -> Zero3Model:
    """A model for which DeepSpeed has made a stream of its own, as it does on a GPU."""
    load_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.current_stream, accelerator.stream = streams.current, streams.on
    with (
        patch.object(type(accelerator), "Stream", property(lambda _: streams.make)),
        patch.object(accelerator, "is_synchronized_device", lambda: False),
        patch.object(torch.Tensor, "record_stream", lambda *_: None),
    ):
        return Zero3Model(CASE.model(), persistence_threshold=0)


def forward(optimizer: MaskedAdamW) -> Any:
    return optimizer.model(input_ids=IDS, labels=IDS).loss


def by_step(optimizer: MaskedAdamW, folder: Path) -> None:
    optimizer.model.backward(forward(optimizer))
    optimizer.step()


def by_values(optimizer: MaskedAdamW, folder: Path) -> None:
    optimizer.set_values([optimizer.values(support) + 1 for support in optimizer.supports])


def by_delta(optimizer: MaskedAdamW, folder: Path) -> None:
    delta = extract_delta(optimizer.model, optimizer.mask, "task")
    with applied(optimizer.model, delta):
        forward(optimizer)


def by_snapshot(optimizer: MaskedAdamW, folder: Path) -> None:
    Snapshot(optimizer.model, optimizer.mask).restore()


def by_checkpoint(optimizer: MaskedAdamW, folder: Path) -> None:
    load_checkpoint(save_checkpoint(folder, 1, optimizer, {}), optimizer)


def by_state_dict(optimizer: MaskedAdamW, folder: Path) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


WRITERS: tuple[Callable[[MaskedAdamW, Path], None], ...] = (
    *(by_step, by_values, by_delta, by_snapshot, by_checkpoint, by_state_dict),
)


def main(out: Path) -> None:
    streams = Streams()
    optimizer = MaskedAdamW(build(streams), CASE.mask(CASE.model()), lr=1e-2)
    found = {"loaded": list(streams.log)}
    storage = ShardedModel.storage

    def logged(self: ShardedModel, support: Any) -> Any:
        streams.log.append("written")  # by whoever asks where
        return storage(self, support)

    with patch.object(ShardedModel, "storage", logged):
        for write in WRITERS:
            for evaluates in (False, True):  # something is gathered at the moment of the write, or not
                if evaluates:
                    with torch.no_grad():
                        forward(optimizer)
                streams.log.clear()
                write(optimizer, out)
                forward(optimizer)
                found[f"{write.__name__}-{evaluates}"] = list(streams.log)
    (out / "log.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
