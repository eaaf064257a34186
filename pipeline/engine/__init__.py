"""DeepSpeed: nothing outside this package imports it."""

from pipeline.engine.checkpointing import open_sharded_weights
from pipeline.engine.settings import read_deepspeed_json
from pipeline.engine.training import DeepSpeedEngine

__all__ = ["DeepSpeedEngine", "open_sharded_weights", "read_deepspeed_json"]
