"""How important a unit is to a task: a file per score."""

from trace_dist.probe.importance.evidence import Evidence
from trace_dist.probe.importance.score import element_energy, unit_importance

__all__ = ["Evidence", "element_energy", "unit_importance"]
