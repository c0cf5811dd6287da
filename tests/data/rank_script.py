"""One rank of ``test_batches_ranks``: reads its own example stream and writes its shares, or the error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

from trace_dist.data import Batches
from trace_dist.utils import dist


def refused(dataset: datasets.Dataset, micro_batch_size: int = 2) -> str:
    """What the ranks are told."""
    try:
        Batches(dataset, batch_size=2, micro_batch_size=micro_batch_size, seed=0, pad_id=0)
    except ValueError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    dist.init_distributed()
    rows = [{"input_ids": [i, i], "labels": [-100, i], "num_answer_tokens": 1} for i in range(1, 8)]
    same = datasets.Dataset.from_list(rows)
    batches = Batches(same, batch_size=5, micro_batch_size=2, seed=0, pad_id=0)
    steps = [next(batches) for _ in range(3)]
    shares = [[int(row[0]) for m in step.micro_batches for row in m["input_ids"] if row[0]] for step in steps]
    relabelled = same.map(
        lambda row: {"labels": [-100, row["input_ids"][1] + (row["input_ids"][0] == 7) * dist.rank()]}
    )
    found = {
        "shares": shares,
        "error": refused(same.select([dist.rank(), 3])),
        "other_labels": refused(relabelled),
        "other_size": refused(same, micro_batch_size=1 + dist.rank()),
    }
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
