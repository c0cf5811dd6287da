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
    """Addresses of this machine's interfaces that are up, without those that lead to itself alone."""
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
    found, towards = interfaces(), address_towards(os.environ.get("MASTER_ADDR", ""))
    names = {found[towards]} if towards in found else set(found.values())
    if len(names) != 1:
        own = resolved(socket.gethostname()) or "no address"
        known = ", ".join(sorted(names)) or "none is up"
        raise ValueError(
            f"{socket.gethostname()}: its name means {own} to itself, where no other host reaches "
            f"it; set {GLOO} to the interface that joins the hosts ({known})"
        )
    (os.environ[GLOO],) = names
    _logger.info("%s: gloo takes the interface %s", socket.gethostname(), os.environ[GLOO])


def interfaces() -> dict[str, str]:
    """Address -> interface: of IPv4, or of IPv6 where the machine has no other."""
    up = {name for name, facts in psutil.net_if_stats().items() if facts.isup}
    for family in (socket.AF_INET, socket.AF_INET6):
        found = {
            each.address: name
            for name, kept in psutil.net_if_addrs().items()
            for each in kept
            if name in up and each.family == family and not leads_home(each.address)
        }
        if found:
            return found
    return {}


def resolved(name: str) -> str | None:
    """The address that a name means here, of IPv4 where there is one; None where it means none."""
    # UnicodeError: it cannot be a name.
    with suppress(OSError, UnicodeError):
        found = [str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
        return next((address for address in found if ":" not in address), found[0])
    return None


def leads_home(address: str) -> bool:
    """Whether an address is of this machine alone, or, as of a link, means nothing without an interface."""
    return address == "::1" or address.startswith(("127.", "fe80:"))


def open_port() -> socket.socket:
    """What listens on a free port of all addresses, of IPv4 and IPv6."""
    if socket.has_dualstack_ipv6():
        # No IPv6 in the kernel of this namespace.
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=1024)


def address_towards(place: str) -> str | None:
    """The address of this machine that packets to a place would carry; nothing is sent."""
    address = resolved(place)
    if address is None:
        return None
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return None


def _is_loopback(name: str) -> bool:
    address = resolved(name)
    return address is None or leads_home(address)
