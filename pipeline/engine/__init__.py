"""DeepSpeed: nothing outside this package imports it."""

from pipeline.engine.settings import read_deepspeed_json
from pipeline.engine.training import DeepSpeedEngine, open_sharded_weights

__all__ = ["DeepSpeedEngine", "open_sharded_weights", "read_deepspeed_json"]
