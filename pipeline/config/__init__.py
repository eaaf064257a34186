"""Define, parse and check every setting of a run; no other module parses settings.

A YAML file describes a run, with one section per dataclass below. The command line can override any key
(``--train.steps 1000``). `load` returns a checked `Config`, or raises one `UserError` that names the key, the
value and the remedy.
"""

from pipeline.config.data import DataConfig, Phase, PhaseConfig
from pipeline.config.load import Config, build_parser, load, to_yaml
from pipeline.config.model import ModelConfig
from pipeline.config.monitor import MonitorConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.resilience import GuardConfig, WatchdogConfig
from pipeline.config.run import CheckpointConfig, EvaluationConfig, ProfilingConfig, TaskConfig
from pipeline.config.training import (
    EngineConfig,
    LargerBatchConfig,
    OptimizerConfig,
    Recompute,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LargerBatchConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Phase",
    "PhaseConfig",
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
