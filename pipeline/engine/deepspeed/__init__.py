"""DeepSpeed: nothing outside this package imports it."""

from pipeline.engine.deepspeed.checkpointing import open_sharded_weights
from pipeline.engine.deepspeed.engine import DeepSpeedEngine
from pipeline.engine.deepspeed.settings import compatible_ops, read_deepspeed_json, read_settings

__all__ = [
    "DeepSpeedEngine",
    "compatible_ops",
    "open_sharded_weights",
    "read_deepspeed_json",
    "read_settings",
]
