"""Every shipped configuration: loaded, built without contents, planned, and its JSON taken by DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from pipeline import config as configuration
from pipeline.engine.build import engine_settings
from pipeline.engine.deepspeed.settings import complete_settings
from pipeline.planning import presets
from pipeline.planning.memory import count_parameters
from pipeline.planning.presets import DOCUMENT, PRESETS, Preset
from pipeline.ranks import Ranks
from support.programs import ROOT

PARAMETERS = {  # by hand: embedding (twice where untied), blocks, norms
    "tinygsm_125m": 151_648 * 512 + 14 * (4 * 512**2 + 3 * 512 * 1536 + 2 * 512) + 512,
    "text_3b": 32_000 * 3072 + 28 * (3072 * (2 * 3072 + 2 * 1024 + 3 * 8192) + 2 * 3072) + 3072,
    "text_8b": 2 * 126_464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12_288 + 2 * 4096) + 4096,
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads(path: Path) -> None:
    config = configuration.load(["--config", str(path)])
    assert (ROOT / config.engine.deepspeed_config).is_file()
    if config.model.vocab_size is not None:
        assert path.stem in {preset.name for preset in PRESETS}, "it has a row in docs/explanation/presets.md"
        size = count_parameters(config, config.model.vocab_size).count
        assert size == PARAMETERS.get(path.stem, size)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.name} {preset.gpus} {preset.gpu}")
def test_deepspeed_takes_the_settings_of_a_preset(preset: Preset) -> None:
    config = preset.load(ROOT)
    train = config.train.fitted(preset.gpus)
    assert train == config.train, "the micro-batch divides a rank's share"
    ranks = Ranks(0, preset.gpus, device=torch.device("cuda", 0))
    made = complete_settings(engine_settings(config, preset.gpus), config, ranks)
    read = DeepSpeedConfig(made)
    stage = json.loads(Path(config.engine.deepspeed_config).read_text())["zero_optimization"]["stage"]
    assert read.zero_config.stage == stage
    assert read.train_micro_batch_size_per_gpu == train.micro_batch_size
    assert read.bfloat16_config.enabled


def test_the_table_is_what_the_command_writes() -> None:
    """And every preset fits."""
    document = (ROOT / DOCUMENT).read_text(encoding="utf-8")
    made = presets.table(ROOT)
    assert presets.with_table(document, made) == document, "run python tools/plan_presets.py"
    assert all(int(line.split("|")[6]) > 0 for line in made.splitlines()[2:])
