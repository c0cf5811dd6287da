"""The configuration of a run: frozen dataclasses, read from YAML by jsonargparse (see ``cli``).

One YAML file describes a whole run; every command reads the same file and uses its sections. The docstring
under a field is its help text. Values are checked when a dataclass is built, so that a wrong value is
one clear error before any work starts.
"""

from trace_dist.config.bank import BankConfig
from trace_dist.config.continual import ContinualConfig
from trace_dist.config.data import DataConfig
from trace_dist.config.evaluation import EvalConfig
from trace_dist.config.granularity import Granularity
from trace_dist.config.launch import LaunchConfig
from trace_dist.config.mask import MaskConfig
from trace_dist.config.model import Dtype, ModelConfig, PruneConfig, Quantize, TinyConfig, VitConfig
from trace_dist.config.probe import ProbeConfig
from trace_dist.config.projection import ProjectionConfig
from trace_dist.config.race import RaceConfig
from trace_dist.config.run import Backend, RunConfig
from trace_dist.config.task import GeneralConfig, TaskConfig
from trace_dist.config.train import StateDtype, TrainConfig

__all__ = [
    "Backend",
    "BankConfig",
    "ContinualConfig",
    "DataConfig",
    "Dtype",
    "EvalConfig",
    "GeneralConfig",
    "Granularity",
    "LaunchConfig",
    "MaskConfig",
    "ModelConfig",
    "ProbeConfig",
    "ProjectionConfig",
    "PruneConfig",
    "Quantize",
    "RaceConfig",
    "RunConfig",
    "StateDtype",
    "TaskConfig",
    "TinyConfig",
    "TrainConfig",
    "VitConfig",
]
