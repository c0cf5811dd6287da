"""The addresses of this machine, and the interface over which gloo reaches the other hosts of a job."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress

import psutil

from trace_dist.utils.launch import is_spread

GLOO = "GLOO_SOCKET_IFNAME"
_logger = logging.getLogger("trace_dist.network")


def addresses() -> list[str]:
    """IPv4 addresses of this machine's interfaces that are up, without those that lead to itself alone."""
    return list(interfaces())


def spans_hosts() -> bool:
    """Whether the launcher says that some ranks are on other machines."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    # torchrun and accelerate, DeepSpeed.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name][:9]) < size
    return is_spread()


def joining_address() -> str | None:
    """This machine's address on gloo's interface, or else on the first one; None where it has none but its loopback."""
    found = interfaces()
    chosen = [address for address, name in found.items() if name == os.environ.get(GLOO)]
    return next(iter([*chosen, *found]), None)


def choose_interface() -> None:
    """Name the interface to gloo where it would take one that leads to this machine alone.

    gloo takes the address of the host's own name, and Debian gives that as 127.0.1.1.

    Raises:
        ValueError: several interfaces could be it.
    """
    if GLOO in os.environ or not spans_hosts() or not _is_loopback(socket.gethostname()):
        return
    found, towards = interfaces(), _address_towards(os.environ.get("MASTER_ADDR", ""))
    names = {found[towards]} if towards in found else set(found.values())
    if len(names) != 1:
        known = ", ".join(sorted(names)) or "none is up"
        raise ValueError(
            f"{socket.gethostname()}: its name means {_resolved(socket.gethostname())} to itself, where no other host reaches "
            f"it; set {GLOO} to the interface that joins the hosts ({known})"
        )
    (os.environ[GLOO],) = names
    _logger.info("%s: gloo takes the interface %s", socket.gethostname(), os.environ[GLOO])


def interfaces() -> dict[str, str]:
    """Address -> interface."""
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    return {
        each.address: name
        for name, found in psutil.net_if_addrs().items()
        for each in found
        if name in up and each.family == socket.AF_INET and not each.address.startswith("127.")
    }


def _resolved(name: str) -> str:
    with suppress(OSError):
        return socket.gethostbyname(name)
    return "no address"


def _is_loopback(name: str) -> bool:
    return _resolved(name).startswith("127.") or _resolved(name) == "no address"


def _address_towards(place: str) -> str | None:
    """The address of this machine that packets to a place would carry; nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place, 9))
        return str(probe.getsockname()[0])
    return None
