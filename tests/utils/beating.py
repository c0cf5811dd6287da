"""A rank that only lives, for test_heartbeat.py: ``beating.py RANK PLACE SILENCE STUCK BEHAVIOUR``. Loads no torch."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from trace_dist.utils import activity
from trace_dist.utils.heartbeat import Heartbeat, Patience
from trace_dist.utils.wire import Place, connect, listen

HOSTS = ["node-1", "node-2", "node-3"]


def barrier(seconds: float) -> None:
    """Waits in a function whose name and file say that it is a collective."""
    file = "/torch/distributed/distributed_c10d.py"
    scope = {"sleep": time.sleep}
    exec(compile("def barrier(seconds): sleep(seconds)", file, "exec"), scope)
    scope["barrier"](seconds)


def main(rank: int, place: Path, patience: Patience, behaviour: str) -> int:
    listener = hub = None
    if rank == 0:
        listener = listen(everywhere=False)
        found = Place(["127.0.0.1"], listener.getsockname()[1], "word")
        place.with_suffix(".new").write_text(json.dumps(asdict(found)))
        place.with_suffix(".new").rename(place)
    else:
        while not place.exists():
            time.sleep(0.01)
        found = Place(**json.loads(place.read_text()))
        hub = connect(found)
    heartbeat = Heartbeat(rank, HOSTS, patience, found.token, listener=listener, hub=hub)
    activity.begin("train")
    activity.note("retrieved: copy", 7, 40)
    place.with_name(f"pid-{rank}").write_text(str(os.getpid()))
    if behaviour == "wait":
        barrier(60)
    elif behaviour == "threads":
        threading.Event().wait(60)
    elif behaviour == "leave":
        time.sleep(1)
    elif behaviour == "fail":
        time.sleep(0.5)
        heartbeat.leave(ok=False)
        return 2
    elif behaviour == "kill":
        time.sleep(2.2)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        time.sleep(60)
    heartbeat.leave(ok=True)
    return 0


if __name__ == "__main__":
    silence, stuck = map(float, sys.argv[3:5])
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Patience(silence, stuck, 0.5, 1.0), sys.argv[5]))
