"""``trace-dist serve``: a bank behind OpenAI's interface. The key is read from the environment and goes nowhere else."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec

from trace_dist.config.checks import check
from trace_dist.serving.options import Listening, Source
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
KEY = "TRACE_DIST_API_KEY"
"""Environment variable of the key that requests must bear; without it everybody may ask."""
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(source: Source, listening: Listening) -> None:
    """Serve until the process is told to end; what has been asked by then is answered.

    Raises:
        ValueError: packages are missing, the address is taken, or the bank or its base cannot be opened.
    """
    source.check_alone("serve")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve: {', '.join(missing)} is not installed; pip install 'trace-dist[serve]'")
    rule, cure = f"must be at most batch_size={source.batch_size}", "lower it, or raise batch_size"
    check(listening.max_n <= source.batch_size, "max_n", listening.max_n, rule, cure)
    key = _key()
    with _bound(listening) as place:
        import torch

        from trace_dist.serving.api import make_app
        from trace_dist.serving.gate import Gate
        from trace_dist.serving.router import Router
        from trace_dist.serving.tally import Tally
        from trace_dist.serving.worker import Worker

        router = Router.of(source)
        # Of draws without a seed of their own.
        torch.seed()
        tally = Tally()
        worker = Worker(router, listening, tally)
        tally.watch(lambda: worker.num_open, lambda: router.bank.generation)
        app = Gate(make_app(router, worker, listening, tally), key, listening.max_body_kib * 1024, tally)
        worker.start()
        try:
            # From here on connections wait for the server rather than being refused: who reads the line below may ask at once.
            place.listen()
            _say(router.tasks, source, place, key is not None)
            _listen(app, place, lambda: worker.num_open)
        finally:
            worker.close()
    logger.info("ended; all that was asked is answered")


def _key() -> str | None:
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise ValueError(f"{KEY}: is set and empty; set a key, or unset it to let everybody ask")
    # As a request's is read: secrets that were written to a file end with a line.
    return None if key is None else key.strip()


def _bound(listening: Listening) -> socket.socket:
    """The address, taken before anything slow; connections are refused until the model is there."""
    where = f"host={listening.host!r}, port={listening.port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            listening.host, listening.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        place = socket.socket(family, kind, proto)
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Its connections have it too: one whose client was switched off amid a request is closed some day.
            place.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            place.bind(address)
        except OSError:
            place.close()
            raise
    except OSError as error:
        raise ValueError(
            f"{where}: cannot be listened on ({error.strerror or error}); choose another"
        ) from None
    return place


def _say(tasks: list[str], source: Source, place: socket.socket, with_key: bool) -> None:
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not with_key and host not in ("127.0.0.1", "::1"):
        logger.warning("everybody who reaches %s may ask; set %s to demand a key", host, KEY)
    logger.info("%d models of %s on http://%s:%d/v1", len(tasks) + 1, source.bank, shown, port)


def _listen(app: object, place: socket.socket, num_open: Callable[[], int]) -> None:
    """Until SIGTERM or Ctrl+C; open requests, of which ``num_open`` prompts are not answered yet, are answered first."""
    import uvicorn

    from trace_dist.serving.ending import Server

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
    )
    # uvicorn gives the signals that ended it to whom had them before; that is an end like any other.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with suppress(KeyboardInterrupt):
            Server(config, num_open).run(sockets=[place])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
