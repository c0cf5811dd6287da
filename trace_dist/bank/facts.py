"""What the index says of a task, so that a bank can be shown without reading a delta."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from trace_dist.bank.delta import Delta
from trace_dist.bank.signature import KIND, LIKELIHOOD, Signature

DEFAULTS = {"signature": KIND, "likelihood": LIKELIHOOD}
"""Of a task whose facts do not say."""
MAX_BYTES = 65_536
"""Of the facts given by the one who adds a task: the index is read at every opening."""


def describe(
    delta: Delta | None, signature: Signature, training: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Facts of a task.

    Args:
        delta: None for the base model.
        signature: of the same task.
        training: small JSON values from whoever trained it, such as the learning rate and the steps.

    Raises:
        ValueError: ``training`` is no JSON, or too large.
    """
    facts: dict[str, Any] = {"clusters": signature.num_clusters, "dim": signature.dim}
    kinds = {"signature": signature.kind, "likelihood": signature.likelihood}
    # What every bank had before there were kinds is not said, and a bank that is made again has the same bytes.
    facts |= {key: value for key, value in kinds.items() if value != DEFAULTS[key]}
    if delta is not None:
        facts |= {
            "mask": delta.mask.digest(),
            "entries": delta.mask.num_entries,
            "density": delta.mask.density,
            "granularity": delta.mask.granularity,
            "dtype": "+".join(delta.dtypes),
        }
    if delta is not None and "quantize" in delta.mask.meta:
        facts["quantize"] = str(delta.mask.meta["quantize"])
    if training:
        facts["training"] = _json(training)
    return facts


def kind_of(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and likelihood of the signature of a task, from its facts."""
    said = DEFAULTS | dict(facts)
    return str(said["signature"]), str(said["likelihood"])


def dtype_of(facts: Mapping[str, Any]) -> str | None:
    """Data type of the model that a task was learned on; None for the base model."""
    return narrowest(facts["dtype"].split("+")) if "dtype" in facts else None


def narrowest(dtypes: Collection[str]) -> str | None:
    """Of the data types of a delta's values, that of its model: some families keep a few tensors in fp32. None of none."""
    return next(iter(sorted({*dtypes} - {"float32"}) or dtypes), None)


def check_dtype(found: str | None, facts: Iterable[Mapping[str, Any]], what: str, bank: object) -> None:
    """Raise ValueError unless values of a data type may stand beside those of a bank's tasks: one model answers for all."""
    held = {dtype for each in facts if (dtype := dtype_of(each)) is not None}
    if held and found is not None and found not in held:
        raise ValueError(
            f"{what}: the tasks of the bank {bank} are {' and '.join(sorted(held))}, and one model answers for all of them; "
            "learn the task in that data type (target.dtype)"
        )


def _json(training: Mapping[str, Any]) -> Any:
    try:
        text = json.dumps(dict(training), allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"facts: {error}; give numbers, texts, and lists and dictionaries of them") from None
    if len(text) > MAX_BYTES:
        raise ValueError(f"facts: {len(text)} bytes, may have at most {MAX_BYTES}; give less")
    return json.loads(text)
