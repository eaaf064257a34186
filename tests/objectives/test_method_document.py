"""docs/explanation/method.md: the settings that it shows are accepted, together and with their values."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline import config
from support.documents import blocks, text_of

PAGE = "docs/explanation/method.md"


def test_every_setting_that_the_document_shows_is_accepted(tmp_path: Path) -> None:
    shown = blocks(text_of(PAGE), "yaml")
    assert len(shown) == 4
    for number, text in enumerate(shown):
        path = tmp_path / f"{number}.yaml"
        run = {"run_dir": "x", "data": {"prefixes": ["a"]}, "train": {"steps": 900_000}}
        path.write_text(yaml.safe_dump(run | yaml.safe_load(text)))
        loaded = config.load(["--config", str(path)])
        for section, settings in yaml.safe_load(text).items():
            for key, value in settings.items():
                assert getattr(getattr(loaded, section), key) == value
