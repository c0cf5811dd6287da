"""What is selected together, and how that may differ between roles of parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from trace_dist.config.checks import check

Granularity = Literal["element", "block", "row", "column", "head", "neuron", "tensor"]
NEURON = "neuron"
"""Of an MLP a row of gate and up and the column of down, selected together (masks/tied.py); elsewhere a row."""
ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "embed", "head", "norm", "bias", "other")
"""Roles that parameters have (models/roles.py)."""
EXAMPLE = "'row', or 'row,q=head,down=column' where roles differ"


@dataclass(frozen=True)
class Granularities:
    """The granularity of each role.

    Attributes:
        usual: of all roles that are not named.
        by_role: role -> its own.
    """

    usual: str
    by_role: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, name: str = "mask.granularity") -> Granularities:
        """From ``row`` or ``row,q=head,down=column``.

        Raises:
            ValueError: no such granularity or role, a role twice, or whole tensors beside parts of others.
        """
        usual, *others = (part.strip() for part in text.split(","))
        kinds = ", ".join(map(repr, get_args(Granularity)))
        found: dict[str, str] = {}
        for part in others:
            role, _, kind = (each.strip() for each in part.partition("="))
            check(
                role in ROLES and role not in found,
                name,
                text,
                f"{role!r} is no role, or named twice",
                f"use {EXAMPLE}",
            )
            found[role] = kind
        for kind in (usual, *found.values()):
            check(kind in get_args(Granularity), name, text, f"must be one of {kinds}", f"use {EXAMPLE}")
        mlp = {found.get(role, usual) == NEURON for role in ("gate", "up", "down")}
        if "gate_up" in found:
            mlp.add(found["gate_up"] == NEURON)
        check(
            len(mlp) == 1,
            name,
            text,
            "a neuron lies in gate, up and down",
            "leave these roles to neuron, or to none",
        )
        mixed = bool(found) and "tensor" in (usual, *found.values())
        check(not mixed, name, text, "tensor takes all tensors whole", "leave the roles out, or use rows")
        return cls(usual, found)

    def of(self, role: str) -> str:
        """What the units of a role are: its granularity, and of a neuron the part that lies there."""
        kind = NEURON if role == "gate_up" and self.neurons else self.by_role.get(role, self.usual)
        return ("column" if role == "down" else "row") if kind == NEURON else kind

    @property
    def neurons(self) -> bool:
        """Whether the parts of a neuron of an MLP are selected together."""
        return self.by_role.get("up", self.usual) == NEURON

    @property
    def all(self) -> set[str]:
        """Those that occur."""
        return {self.usual, *self.by_role.values()}
