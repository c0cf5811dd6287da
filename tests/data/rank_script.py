"""One rank of ``test_batches_ranks``: reads its own example stream and writes its shares, or the error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets

from trace_dist.data import Batches
from trace_dist.utils import dist


def main(out: Path) -> None:
    dist.init_distributed()
    rows = [{"input_ids": [i, i], "labels": [-100, i], "num_answer_tokens": 1} for i in range(1, 8)]
    same = datasets.Dataset.from_list(rows)
    batches = Batches(same, batch_size=5, micro_batch_size=2, seed=0, pad_id=0)
    steps = [next(batches) for _ in range(3)]
    shares = [[int(row[0]) for m in step.micro_batches for row in m["input_ids"] if row[0]] for step in steps]
    error = ""
    try:
        Batches(same.select([dist.rank(), 3]), batch_size=2, micro_batch_size=2, seed=0, pad_id=0)
    except ValueError as caught:
        error = str(caught)
    (out / f"rank{dist.rank()}.json").write_text(json.dumps({"shares": shares, "error": error}))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
