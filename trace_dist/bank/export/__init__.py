"""Ways of handing a bank's tasks to other tools."""

from trace_dist.bank.export.export import export

__all__ = ["export"]
