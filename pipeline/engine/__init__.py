"""DeepSpeed: nothing outside this package imports it."""

from pipeline.engine.settings import read_deepspeed_json
from pipeline.engine.training import DeepSpeedEngine, read_sharded_weights

__all__ = ["DeepSpeedEngine", "read_deepspeed_json", "read_sharded_weights"]
