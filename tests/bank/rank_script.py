"""One rank of ``test_ranks``: changes a bank together with the others, and fails together with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bank.samples import (
    adapted_bank,
    base_model,
    drawn,
    make_delta,
    prompts_of,
    represent_rows,
    small_delta,
)

from trace_dist import DeltaBank
from trace_dist.bank.adapted import retrieve_adapted
from trace_dist.bank.blend import blended
from trace_dist.run_folder import BankFolder
from trace_dist.sharding import ShardedModel
from trace_dist.utils import dist
from trace_dist.utils.sealed import tensors_checksum


def outcome(work: Callable[[], Any]) -> str:
    try:
        return str(work())
    except ValueError as error:
        return str(error)


def activate(bank: DeltaBank, model: ShardedModel) -> str:
    with bank.activated(model, "real"):
        return "activated"


def main(folder: Path, out: Path) -> None:
    dist.init_distributed()
    model = base_model(backend="fsdp2")
    bank = DeltaBank.create(folder, "aaaa", layer=1)
    bank.add(drawn("one", 1), small_delta("one", 1))
    bank.add(drawn("real", 2), make_delta(model, "real"))
    found: dict[str, Any] = {"tasks": bank.tasks, "generation": bank.generation}
    found["differs"] = outcome(lambda: bank.add(drawn("one", 3), small_delta("one", 1)))
    found["foreign"] = outcome(lambda: DeltaBank.create(folder, "bbbb", layer=1))
    # this rank's view of the files of a task is another one than rank 0's
    whole = bank.files
    if dist.rank() == 1:
        bank.files = BankFolder(folder / "nowhere")
    found["activated"] = outcome(lambda: activate(bank, model))
    # only rank 0 reads the index, so that all see one generation
    bank.reload()
    found["reloaded"] = [bank.tasks, bank.generation]
    bank.files = whole
    found["again"] = outcome(lambda: activate(bank, model))
    found["retrieved"] = bank.retrieve(torch.full((1, 8), 10.0))
    prompts = [prompt for task in range(2) for prompt in prompts_of(task, 5, seed=50)]
    own = adapted_bank(folder.with_name("adapted"), model, 2)
    base = represent_rows(model, prompts)(range(10))
    found["adapted"] = retrieve_adapted(own, model, base, represent_rows(model, prompts), candidates=2)
    blend = blended(own, model, base)
    found["blend"] = None if blend is None else tensors_checksum(blend.values)
    bank.remove("real")
    found["removed"] = [bank.tasks, DeltaBank(folder).generation]
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
