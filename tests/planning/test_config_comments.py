"""Every number in a configuration's comments is the one of its plan."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.planning.memory import count_parameters
from pipeline.planning.presets import PRESETS
from support.programs import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCALES = {"M": 1e6, "B": 1e9, " G": 1e9}
WORDS = {"one": 1, "two": 2}
NOT_OF_THE_PLAN = (
    r"python tools/\S+ .*",  # tests/corpus and tools/make_sudoku.py itself
    r"arXiv [\d.]+", r"LLaDA 8B", r"Qwen2", r"GSM8K", r"configs/\S+", r"\dx\d", r"--task \w+",
    r"2 CPU ranks, under 5 minutes",  # measured: docs/tutorials/first_run.md
    r"--objective\.block_size 256|--objective\.stages 5|--objective\.stages_maximum 41",  # loaded below
)  # fmt: skip


def comments(path: Path) -> str:
    """Return the comments of a file, one a line; a paragraph of whole lines is one."""
    found = re.sub(r"\n# ", " ", path.read_text(encoding="utf-8"))
    return "\n".join(line.partition("#")[2] for line in found.splitlines() if "#" in line)


def is_rounded(said: str, scale: str, value: float) -> bool:
    """Return whether a number is `value` rounded to as many digits as it has."""
    return float(said) == round(value / SCALES[scale], len(said.partition(".")[2]))


def take(pattern: str, text: str) -> tuple[list[tuple[str, ...]], str]:
    """Return the groups of each match, and the text without the matches."""
    return [match.groups() for match in re.finditer(pattern, text)], re.sub(pattern, "", text)


def parameters(config: Config, vocabulary: str | None) -> int:
    size = int(vocabulary.replace(",", "")) if vocabulary else config.model.vocab_size
    assert size is not None, "it says for which vocabulary"
    return count_parameters(config, size).count


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_numbers_of_comments(path: Path) -> None:
    config = configuration.load(["--config", str(path)])
    length, batch = config.data.sequence_length, config.train.global_batch_size
    text = comments(path)
    found, text = take(r"([\d.]+)([MB]) parameters(?: at a vocabulary of ([\d,]+))?", text)
    for said, scale, vocabulary in found:
        assert is_rounded(said, scale, parameters(config, vocabulary)), said
    found, text = take(r"embedding of the Qwen2 vocabulary has ([\d.]+)(M)", text)
    for said, scale in found:
        assert is_rounded(said, scale, (config.model.vocab_size or 0) * config.model.hidden_size)
    found, text = take(r"(\d+)( G) tokens", text)
    for said, scale in found:
        assert is_rounded(said, scale, config.train.steps * batch * length)
    found, text = take(r"(\d+) puzzles a GPU on (\d+) GPUs", text)
    assert all(int(share) * int(gpus) == batch for share, gpus in found)
    found, text = take(r"(one|\d+) nodes? of (\d+) GPUs", text)
    for nodes, gpus in found:
        assert any(
            preset.name == path.stem
            and preset.gpus == WORDS.get(nodes, nodes.isdigit() and int(nodes)) * int(gpus)
            for preset in PRESETS
        )
    found, text = take(r"(\d+) clues, (\d+) cells", text)
    for clues, cells in found:
        assert int(clues) + int(cells) == length
        assert math.isqrt(int(cells)) ** 2 == int(cells)
    found, text = take(r"(\w+) numbers of (\d+) digits, \+ and =; (\d+) digits of their sum", text)
    for numbers, digits, of_sum in found:
        assert WORDS[numbers] * int(digits) + len("+=") + int(of_sum) == length
        assert int(of_sum) == len(str(2 * (10 ** int(digits) - 1)))
    found, text = take(r"paper's ([\d,]+)(?: tokens)?, padded(?: to a multiple of (\d+))?", text)
    for size, multiple in found:
        step = int(multiple or 8)
        assert -(-int(size.replace(",", "")) // step) * step == config.model.vocab_size
    found, text = take(r"end-of-sequence tokens up to (\d+)", text)
    assert all(int(said) == length for (said,) in found)
    found, text = take(r"--data\.kind pairs --data\.sequence_length (\d+)", text)
    for (said,) in found:
        more = ["--data.kind", "pairs", "--data.sequence_length", said]
        assert configuration.load(["--config", str(path), *more]).data.sequence_length == int(said)
    for pattern in NOT_OF_THE_PLAN:
        text = re.sub(pattern, "", text)
    assert not re.findall(r"\d\S*", text), "numbers that nothing here checks"


def test_the_block_run_of_the_paper_loads() -> None:
    path = ROOT / "configs/tinygsm_125m.yaml"
    settings = re.findall(r"(--objective\.\w+) (\d+)", comments(path))
    assert len(settings) == 3
    config = configuration.load(["--config", str(path), *(part for pair in settings for part in pair)])
    assert config.data.sequence_length % config.objective.block_size == 0
