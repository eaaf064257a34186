"""A run resumes at any world size and ZeRO stage: the plain engine in one process is the oracle."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.engine.deepspeed import checkpointing
from pipeline.ranks import Ranks
from support.programs import Outcome
from support.runs import curve, examples_of, train_on

pytestmark = pytest.mark.distributed

Train = Callable[..., Outcome]
TURNS = 2
# A strong weight decay that only one group of parameters has, chains of different lengths, a moving average.
# The reveals do not ask the model: at another number of ranks, scores that nearly tie are ranked differently.
SETTINGS = f"""
    --objective.policy random --objective.stages 2 --objective.stages_increment 1
    --objective.stages_first_increase 5 --objective.stages_interval 5
    --optimizer.weight_decay 0.5 --optimizer.ema_decay 0.9 --schedule.kind wsd
    --train.log_samples true --evaluation.interval 4 --data.workers 0 --objective.turns {TURNS}
""".split()


def check_each_sample_once(steps: dict[int, list[tuple[int, int]]], size: int) -> None:
    """Every example of a finished epoch is trained on every TURNS steps without a gap, and in one slot."""
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step in sorted(steps):
        assert max(Counter(steps[step]).values()) == 1, "no example is in two slots at once"
        for example in steps[step]:
            seen[example].append(step)
    for example, when in seen.items():
        assert when == list(range(when[0], when[-1] + 1, TURNS)), f"{example} left its slot and came back"
    epochs = Counter(epoch for epoch, _ in seen)
    assert epochs[0] == size, "the first epoch is complete"
    assert {example for epoch, example in seen if epoch == 0} == set(range(size))
    assert len(epochs) > 1, "and the second has begun"


def test_world_sizes_are_interchangeable(data: Path, train: Train, tmp_path: Path) -> None:
    """2, 4, 1 and 2 ranks in turn, by the same command: losses, gradients and averages of one process."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *SETTINGS).code == 0
    for ranks, steps in ((2, 4), (4, 8), (1, 12), (2, 16)):
        output = train_on(ranks, data, parts, *SETTINGS, "--train.steps", str(steps))
        if steps > 4:
            assert f"(step {steps - 4}, written by" in output
        assert f"saved {parts}/checkpoints/step_{steps:08d}" in output
    for key in ("loss", "gradient_norm", "held_out/loss", "held_out/ema_loss"):
        expected, found = dict(curve(whole, key)), dict(curve(parts, key))
        assert found == pytest.approx(expected, abs=1e-5), key
    steps = examples_of(parts)
    assert {step: sorted(each) for step, each in steps.items()} == {
        step: sorted(each) for step, each in examples_of(whole).items()
    }
    check_each_sample_once(steps, 48)
    left = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert left == [f"step_{step:08d}" for step in (4, 8, 12, 16)], "no converted form is left behind"


def test_zero_stages_are_interchangeable(data: Path, train: Train, tmp_path: Path) -> None:
    """3, 2, 2 again, 3 and 1 in turn, on 2, 1 and 2 ranks, with a lower gradient clip from step 9 on."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for steps, clip in (("8", "1.0"), ("20", "0.2")):
        more = ["--train.steps", steps, "--optimizer.gradient_clip", clip]
        assert train(whole, *SETTINGS, *more).code == 0
    before = "zero3"
    for ranks, stage, steps in ((2, 3, 4), (2, 2, 8), (2, 2, 12), (1, 3, 16), (2, 1, 20)):
        zero = tmp_path / f"zero{stage}.json"
        zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        more = ["--engine.deepspeed_config", str(zero), "--train.steps", str(steps)]
        more += ["--engine.precision", "fp32"]  # ZeRO-1 asks for it
        more += ["--optimizer.gradient_clip", "1.0" if steps <= 8 else "0.2"]
        output = train_on(ranks, data, parts, *SETTINGS, *more)
        assert (f", under {before})" in output) == (before != f"zero{stage}")
        before = f"zero{stage}"
    norms = dict(curve(whole, "gradient_norm"))
    assert min(norms[step] for step in (12, 16, 20)) > 0.2, "the clip is at work"
    for key in ("loss", "gradient_norm", "held_out/loss", "held_out/ema_loss"):
        expected, found = dict(curve(whole, key)), dict(curve(parts, key))
        assert found == pytest.approx(expected, abs=1e-5), key


@pytest.mark.parametrize("stage", [2, 3])
def test_muon_resumes(data: Path, tmp_path: Path, stage: int) -> None:
    """Bit for bit on as many ranks; with its momentum on fewer, under the other stage."""
    more = [
        *SETTINGS,
        "--optimizer.kind",
        "muon",
        "--engine.precision",
        "fp32",
        "--optimizer.learning_rate",
        "3e-3",
    ]

    def train(run_dir: Path, ranks: int, stage: int, steps: int) -> None:
        settings = tmp_path / f"zero{stage}.json"
        settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        json_file = ["--engine.deepspeed_config", str(settings)]
        train_on(ranks, data, run_dir, *more, *json_file, "--train.steps", str(steps))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 2, stage, 8)
    for ranks, of_part, steps in ((2, stage, 4), (2, stage, 6), (1, 5 - stage, 8)):
        train(parts, ranks, of_part, steps)
    for key in ("loss", "gradient_norm", "held_out/ema_loss"):
        expected, resumed = dict(curve(whole, key)), dict(curve(parts, key))
        for step, value in expected.items():
            assert resumed[step] == (value if step <= 6 else pytest.approx(value, abs=1e-5)), (key, step)


CONVERTER = """#!{python}
import os, pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("--output_folder") + 1])
output.mkdir(parents=True)
(output / "group").write_text(str(os.getpgrp()))
"""


def test_a_signal_to_the_ranks_leaves_the_conversion_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems and terminals signal a whole process group: the converter is in none of the ranks'."""
    program, folder = tmp_path / "converter", tmp_path / "step_00000004" / "model"
    program.write_text(CONVERTER.format(python=sys.executable))
    program.chmod(0o755)
    (folder / checkpointing.TAG).mkdir(parents=True)
    monkeypatch.setattr(checkpointing.sys, "executable", str(program))
    converted = checkpointing.make_universal(folder, tmp_path, Ranks())
    assert int((converted / checkpointing.TAG / "group").read_text()) != os.getpgrp()
