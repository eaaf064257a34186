"""Every setting of a run, its unit, its check and its remedy; no other module parses settings.

A run is described by a YAML file with one section for each dataclass here. Any key can be overridden on the
command line (``--train.steps 1000``). `load` returns a checked `Config`; what is wrong becomes one
`UserError` that names the key, the value and the remedy.
"""

from pipeline.config.data import DataConfig
from pipeline.config.load import Config, build_parser, load, to_yaml
from pipeline.config.model import ModelConfig
from pipeline.config.monitor import MonitorConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.resilience import GuardConfig, WatchdogConfig
from pipeline.config.run import CheckpointConfig, EvaluationConfig, ProfilingConfig, TaskConfig
from pipeline.config.training import EngineConfig, OptimizerConfig, Recompute, ScheduleConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ProfilingConfig",
    "Recompute",
    "ScheduleConfig",
    "TaskConfig",
    "TrainConfig",
    "WatchdogConfig",
    "build_parser",
    "load",
    "to_yaml",
]
