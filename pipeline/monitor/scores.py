"""Read the results that tools/evaluate.py has written to RUN/evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from pipeline.base.files import sha256_of
from pipeline.checkpoint.manifest import MANIFEST, STEP_FOLDER

SCORES_FOLDER = "evaluation"
_OWN_COLUMN = {"--checkpoint", "--task", "--data", "--untrained"}
_HASHES = "sha256 of "


@dataclass(frozen=True)
class Score:
    """The results in one file.

    Attributes:
        file: name of the file.
        task: what was measured; empty if the file holds no results.
        data: the items, as given on the command line.
        checkpoint: what was evaluated, in words.
        result: the score with its uncertainty, in words.
        items: number of items.
        options: all other settings, as on the command line.
    """

    file: str
    task: str
    data: str
    checkpoint: str
    result: str
    items: int
    options: str


def read_scores(run_dir: Path) -> list[Score]:
    """Return the results in RUN/evaluation, by file name."""
    return [_read(path, run_dir) for path in sorted((run_dir / SCORES_FOLDER).glob("*.json"))]


def _read(path: Path, run_dir: Path) -> Score:
    try:
        tree = orjson.loads(path.read_bytes())
        settings, figures = tree["settings"], tree["figures"]
        result, items = _result(figures)
        return Score(
            path.name,
            settings["--task"],
            settings["--data"],
            _checkpoint(settings, run_dir),
            result,
            items,
            _options(settings),
        )
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return Score(path.name, "", "", "", "holds no results of tools/evaluate.py", 0, "")


def _result(figures: dict[str, Any]) -> tuple[str, int]:
    """Return the score in words and the number of items; raise a KeyError for figures of another kind."""
    if "accuracy" in figures:
        low, high = figures["interval"]
        return f"accuracy {figures['accuracy']:.4f}, 95% interval {low:.4f} to {high:.4f}", figures["total"]
    form = {
        name: "?" if value is None else f"{value:.4f}"
        for name, value in figures.items()
        if not isinstance(value, (list, dict))
    }
    if "distinct_1" in figures:  # samples
        truth = figures["reference"]
        words = (
            f"perplexity of samples {form['perplexity']} (true texts {truth['perplexity']:.4f}), unigram "
            f"entropy {form['entropy']} ({truth['entropy']:.4f})"
        )
        return words, figures["samples"]
    words = (
        f"{form['nll']} nats per sequence, standard error {form['standard_error']}; "
        f"perplexity {form['perplexity']}, {form['bits_per_byte']} bits per byte"
    )
    return words, figures["sequences"]


def _checkpoint(settings: dict[str, Any], run_dir: Path) -> str:
    """Return what was evaluated; a checkpoint by its step, and whether it still is that of the run."""
    folder = Path(settings["--checkpoint"])
    found = STEP_FOLDER.fullmatch(folder.name)
    words = f"step {int(found[1]):,}" if found else folder.name
    if settings["--untrained"]:
        return f"initial weights of {words}"
    here = run_dir / "checkpoints" / folder.name / MANIFEST
    if not here.is_file():
        return f"{words} (no longer in the run)"
    same = sha256_of(here) == settings["sha256 of the checkpoint's manifest"]
    return words if same else f"{words} (not the run's checkpoint of that name)"


def _options(settings: dict[str, Any]) -> str:
    words = []
    for name, value in settings.items():
        if name in _OWN_COLUMN or name.startswith(_HASHES) or value is None or value is False:
            continue
        words.append(name if value is True else f"{name} {value}")
    return " ".join(words)
