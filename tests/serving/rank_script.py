"""One rank of ``test_ranks``: asks a bank whose base is spread over the ranks, together with the others."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from serving.small import CAP, TASKS, prompts

from trace_dist import Router
from trace_dist.bank.bank import BASE
from trace_dist.serving.options import Sampling
from trace_dist.utils import dist, held

ASKED = [text for task in (*TASKS[:3], BASE) for text in prompts(task, 3, seed=1)]
LONG = 60


def main(folder: Path, backend: str, out: Path) -> None:
    # Room for some deltas alone: the others are read again each time, by all ranks.
    router = Router.open(folder / "bank", folder / "base", backend=backend, batch_size=4, cache_gib=2e-5)
    found: dict[str, Any] = {"written": []}
    generate = router.model.module.generate

    def noted(**options: Any) -> Any:
        found["written"].append(len(options["input_ids"]))
        return generate(**options)

    with patch.object(router.model.module, "generate", noted):
        answers = router.ask(ASKED, sampling=Sampling(max_new_tokens=CAP))
    found["answers"] = [asdict(answer) for answer in answers]
    found["ended"] = [
        asdict(answer) for answer in router.ask(ASKED, sampling=Sampling(max_new_tokens=CAP, stop=["b"]))
    ]
    # Weights that no rank can hold whole: forward passes are collective, and a rank without a prompt takes part in them.
    with patch.object(held, "SHARE", 0):
        found["gathered"] = [
            [answer.text for answer in router.ask(ASKED[:num], sampling=Sampling(max_new_tokens=CAP))]
            for num in (1, 3)
        ]
    drawn = Sampling(max_new_tokens=CAP, temperature=1.0)
    found["drawn"] = [answer.text for answer in router.ask(ASKED, sampling=drawn)]
    # Only one rank shows what is written.
    pieces: list[str] = []
    listener = (lambda _, piece: pieces.append(piece)) if dist.is_main() else None
    (answer,) = router.ask(ASKED[:1], sampling=Sampling(max_new_tokens=CAP), on_text=listener)
    found["shown"] = [answer.text, "".join(pieces)]
    stream = router.stream(ASKED[0], sampling=Sampling(max_new_tokens=CAP))
    found["pieces"] = list(stream)
    # Nobody reads on, on rank 0.
    cut = router.stream(ASKED[0], sampling=Sampling(max_new_tokens=LONG))
    if dist.is_main():
        cut.close()
    found["cut"] = asdict(cut.answer)
    found["kept"] = router.holds_base()
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
