"""DeepSpeed: nothing outside this package imports it."""

from pipeline.engine.checkpointing import open_sharded_weights
from pipeline.engine.settings import check_settings, compatible_ops, read_deepspeed_json
from pipeline.engine.training import DeepSpeedEngine

__all__ = [
    "DeepSpeedEngine",
    "check_settings",
    "compatible_ops",
    "open_sharded_weights",
    "read_deepspeed_json",
]
