"""``none``: every task begins at the base, whatever was learned before."""

from __future__ import annotations

from trace_dist.continual.starts.base import Start


class Base(Start):
    """No composition."""

    label = "from the base"


START = Base
