"""How important a unit is to a task: a file per score."""

from trace_dist.probe.importance.evidence import Evidence, Trace
from trace_dist.probe.importance.score import combined, element_energy, parts_of, unit_importance

__all__ = ["Evidence", "Trace", "combined", "element_energy", "parts_of", "unit_importance"]
