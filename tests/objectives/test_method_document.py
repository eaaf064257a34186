"""docs/explanation/method.md: the tests that it names exist, the settings that it shows are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pipeline import config
from support.programs import ROOT

TEXT = (ROOT / "docs/explanation/method.md").read_text()


def test_every_test_that_the_document_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 20
    assert named <= written, sorted(named - written)


def test_every_setting_that_the_document_shows_is_accepted(tmp_path: Path) -> None:
    shown = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert len(shown) == 4
    for number, text in enumerate(shown):
        path = tmp_path / f"{number}.yaml"
        run = {"run_dir": "x", "data": {"prefixes": ["a"]}, "train": {"steps": 900_000}}
        path.write_text(yaml.safe_dump(run | yaml.safe_load(text)))
        loaded = config.load(["--config", str(path)])
        for section, settings in yaml.safe_load(text).items():
            for key, value in settings.items():
                assert getattr(getattr(loaded, section), key) == value
