"""Saying by name what a form cannot hold."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 5


def refuse(kind: str, unfit: Mapping[str, str], rule: str, cure: str) -> None:
    """Raise ValueError where there is a parameter that a form cannot hold.

    Args:
        kind: name of the exporter.
        unfit: parameter -> why.
        rule: what the form holds.
        cure: ends the message.
    """
    if unfit:
        shown = ", ".join(f"{name} ({why})" for name, why in list(unfit.items())[:SHOWN])
        more = f" and {len(unfit) - SHOWN} more" if len(unfit) > SHOWN else ""
        raise ValueError(f"{kind}: cannot hold {shown}{more}; {rule}, and nothing else; {cure}")
