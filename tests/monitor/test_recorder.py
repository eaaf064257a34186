"""Curves of whole runs: in TensorBoard, in metrics.jsonl and on Weights & Biases."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.backend_context import _sort_and_reduce_to_hparams_limit
from tensorboard.plugins.hparams.metadata import (
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from pipeline import config as configuration
from pipeline.checkpoint.manifest import read_manifest
from pipeline.config.load import flatten
from pipeline.monitor.dashboard import LAYOUT
from pipeline.monitor.texts import as_plain, read_texts
from pipeline.monitor.writers import JsonLines, Point, TensorBoard, is_measured
from pipeline.planning.flops import step_flops
from support.programs import ROOT, Outcome
from support.runs import curve, metrics
from support.weights import read_weights

Train = Callable[..., Outcome]


def events(run_dir: Path) -> EventAccumulator:
    """Return what TensorBoard finds, nothing thinned out."""
    sizes = {"scalars": 0, "histograms": 0, "tensors": 0}
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=sizes).Reload()


def test_every_curve_is_there_once(run_dir: Path) -> None:
    """Each step of each curve once, as in metrics.jsonl, although the run lost steps and did them again."""
    found = events(run_dir)
    lines = metrics(run_dir)
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in flatten({k: v for k, v in line.items() if k not in ("step", "unix_time")}).items():
            family, _, rest = name.partition(".")
            tag = f"{family}/{rest}" if rest else name
            expected.setdefault(tag if "/" in tag else f"train/{tag}", {})[line["step"]] = value
    scalars = [tag for tag in found.Tags()["scalars"] if not tag.startswith("custom")]
    assert set(expected) <= set(scalars)
    for tag, values in expected.items():
        points = found.Scalars(tag)
        steps = [point.step for point in points]
        if not tag.startswith("time/"):  # a save and an evaluation may come at the same step
            assert len(steps) == len(set(steps)), tag
        assert {point.step: point.value for point in points} == pytest.approx(values, rel=1e-6), tag
    assert sorted(expected["train/loss"]) == list(range(1, 17))
    assert sorted(expected["train/parameter_norm"]) == [4, 8, 12, 16]
    names = """train/tokens_per_second train/skipped_steps speed/tflops speed/data_wait_share memory/host
        calibration/error chains/stages chains/reveals_per_step chains/threshold_share progress/epochs
        progress/unique_samples time/checkpoint_stall time/evaluation held_out/loss held_out/ema_loss
        loss_by_mask_ratio/0.9-1.0 loss_by_stage/00 accuracy_by_confidence/0.1-0.2"""
    for name in names.split():
        assert name in expected, name


def test_every_curve_is_documented(run_dir: Path) -> None:
    """By its name, or by a pattern with an ellipsis for bins and for what a chart joins."""
    named = re.findall(r"`([a-z_]+/?[^` ]*)`( \.\.\.)?", (ROOT / "docs/reference/curves.md").read_text())
    exact = {name for name, more in named if not more and not name.endswith("...")}
    groups = {name.partition("/")[0] for name, more in named if more or name.endswith("...")}
    for tag in events(run_dir).Tags()["scalars"]:
        name = tag.removeprefix("train/")
        assert name in exact or name.partition("/")[0] in groups, tag


def test_histograms_settings_and_first_page(run_dir: Path) -> None:
    found = events(run_dir)
    for name in ("confidence", "chain_age", "chain_length"):
        points = found.Histograms(f"histograms/{name}")
        assert [point.step for point in points] == [4, 8, 12, 16]
        assert all(point.histogram_value.num > 0 for point in points)
    ages = found.Histograms("histograms/chain_age")[0].histogram_value
    assert ages.num == 16 * 4, "each of the 16 slots at each of 4 steps"
    assert [image.step for image in found.Images("texts/0")] == [8, 16]
    written = found.Tensors("texts/0/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert as_plain(read_texts(run_dir)[-2]) in written
    tensors = found.Tags()["tensors"]
    assert "config/text_summary" in tensors
    shown = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    threshold: 0.3\n" in shown.replace("      ", "    ")
    assert "custom_scalars__config__" in tensors
    assert found.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name == "hparams"


def test_the_first_page_shows_what_is_recorded(run_dir: Path) -> None:
    """No chart of the page stays empty, and none is missing, in a run that was resumed."""
    found = events(run_dir)
    tags = found.Tags()["scalars"]
    page = Layout.FromString(found.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    shown = {chart.title: list(chart.multiline.tag) for group in page.category for chart in group.chart}
    for title, patterns in shown.items():
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), title
    known = {title for charts in LAYOUT.values() for title in charts}
    of_tasks = {"accuracy on tasks", "perplexity of samples", "entropy of samples"}
    of_blends = {"loss by source", "held-out loss by source", "held-out loss by phase"}
    assert known - set(shown) == {"MFU"} | of_tasks | of_blends, "only a GPU, a task or a blend has these"


def test_the_first_page_grows_with_the_run(tmp_path: Path) -> None:
    """A chart appears with its first value, and is there at once after a resume."""
    config = configuration.Config(run_dir=str(tmp_path))

    def pages() -> list[set[str]]:
        tensors = events(tmp_path).Tensors("custom_scalars__config__")
        layouts = [Layout.FromString(each.tensor_proto.string_val[0]) for each in tensors]
        return [{chart.title for group in page.category for chart in group.chart} for page in layouts]

    writer = TensorBoard(tmp_path, 1, config, ())
    for step, values in ((1, {"loss": 2.0}), (2, {"loss": 1.0}), (2, {"evaluation/sudoku/accuracy": 0.5})):
        writer.write(Point(step, values, {"loss_by_stage": {"00": 1.0}} if step == 2 else {}))
    writer.close()
    first = [{"loss"}, {"loss", "loss by stage"}, {"loss", "loss by stage", "accuracy on tasks"}]
    assert pages() == first
    lines = JsonLines(tmp_path, 1)
    lines.write(Point(1, {"loss": 2.0, "evaluation/sudoku/accuracy": 0.5}, {"loss_by_stage": {"00": 1.0}}))
    lines.write(Point(2, {"speed/mfu": 0.5}))
    resumed = TensorBoard(tmp_path, 2, config, JsonLines(tmp_path, 2).tags)
    resumed.close()
    assert pages() == [*first, first[-1]]


def test_settings_that_were_varied_come_first(run_dir: Path) -> None:
    """In the order of TensorBoard's own page, with numbers as numbers and the rest as in the YAML."""
    metadata = events(run_dir).summary_metadata
    found = parse_experiment_plugin_data(metadata["_hparams_/experiment"].plugin_data.content)
    _sort_and_reduce_to_hparams_limit(found)
    names = [info.name for info in found.hparam_infos]
    varied = """
        data.kind data.sequence_length data.split engine.kind model.hidden_size model.intermediate_size
        model.layers objective.stages objective.threshold optimizer.ema_decay schedule.warmup_steps
        train.global_batch_size train.log_interval train.log_samples train.micro_batch_size train.steps
    """.split()
    assert names[: len(varied)] == varied
    assert names[len(varied) :] == sorted(names[len(varied) :])
    assert "run_dir" in names, "which differs from run to run, and is not varied"
    content = metadata["_hparams_/session_start_info"].plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    assert values["objective.threshold"].number_value == 0.3
    assert values["train.log_samples"].string_value == "true"
    assert values["model.kv_heads"].string_value == "null"


@pytest.mark.parametrize("turns", [1, 3])
def test_progress_equals_the_sample_log(train: Train, run_dir: Path, tmp_path: Path, turns: int) -> None:
    """Epochs and unique examples are those of the examples that the run says it has trained on."""
    if turns > 1:  # the chains of the last turns begin later
        more = ["--objective.turns", str(turns), "--train.log_samples", "true", "--train.log_interval", "2"]
        run_dir = tmp_path / "run"
        assert train(run_dir, "--train.steps", "8", *more).code == 0
    log = run_dir / "samples/rank_00000.jsonl"
    lines = {line["step"]: line["samples"] for line in map(json.loads, log.read_text().splitlines())}
    seen: set[tuple[int, int]] = set()
    points = {line["step"]: line for line in metrics(run_dir) if "progress/epochs" in line}
    for step in sorted(lines):
        seen |= {(epoch, example) for epoch, example in lines[step]}
        if step in points:
            assert points[step]["progress/epochs"] == pytest.approx(len(seen) / 48)
            assert points[step]["progress/unique_samples"] == sum(epoch == 0 for epoch, _ in seen)
            assert points[step]["progress/tokens"] == step * 16 * 12
    assert len(points) == 4


def test_rates_and_flops_agree(run_dir: Path) -> None:
    """TFLOP/s are the FLOPs of the masked rows that there were, over the time that training took."""
    config = configuration.load(["--config", str(run_dir / "config.yaml")])
    vocabulary = read_manifest(run_dir / "checkpoints/step_00000016").vocabulary["rows"]
    for line in (line for line in metrics(run_dir) if "speed/tflops" in line):
        head = step_flops(config, vocabulary, 1.0).head
        rest = step_flops(config, vocabulary, 0.0).model
        rows = (line["progress/flops_per_step"] - rest) / head
        assert rows == pytest.approx(round(rows * 4) / 4), "a whole number of rows in 4 steps"
        assert 16 <= rows <= 16 * 11
        seconds = line["time/training"] / 4
        assert line["speed/tflops"] == pytest.approx(line["progress/flops_per_step"] / seconds / 1e12)
        assert line["tokens_per_second"] == pytest.approx(16 * 12 / seconds)


def test_parameter_norm_is_that_of_the_weights(run_dir: Path) -> None:
    weights = read_weights(run_dir / "checkpoints/step_00000016/model")
    unique = {weight.data_ptr(): weight for name, weight in weights.items() if name != "lm_head.weight"}
    expected = math.sqrt(sum(float(weight.double().square().sum()) for weight in unique.values()))
    assert dict(curve(run_dir, "parameter_norm"))[16] == pytest.approx(expected, rel=1e-6)


class StandIn(ModuleType):
    """A module wandb that remembers what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str]] = []
        self.finished = 0

    def init(self, **options: Any) -> StandIn:
        self.begun.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.defined.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def Html(self, page: str) -> str:
        return page

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_same_curves(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run resumes there, too."""
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    more = ["--monitor.wandb", "true", "--monitor.wandb_project", "mine"]
    run_dir = tmp_path / "run"
    assert train(run_dir, "--train.steps", "8", *more).code == 0
    assert train(run_dir, *more).code == 0
    one, two = wandb.begun
    assert one["id"] == two["id"]
    assert (one["project"], one["name"], two["resume"]) == ("mine", "run", "allow")
    assert one["config"]["objective"]["stages"] == 4
    assert wandb.defined[0] == ("*", "step")
    assert wandb.finished == 2
    lines = metrics(run_dir)
    texts = [logged for logged in wandb.logged if "texts/0" in logged]
    points = [logged for logged in wandb.logged if "texts/0" not in logged]
    assert [logged["step"] for logged in texts] == [8, 16]
    assert len(points) == len(lines)
    for line, logged in zip(lines, points, strict=True):
        assert logged["step"] == line["step"]
        if "loss" in line:
            assert logged["train/loss"] == line["loss"]
    assert any("loss_by_stage/00" in logged for logged in wandb.logged)


def test_wandb_that_is_missing_is_one_line(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    complaint = train(tmp_path / "run", "--monitor.wandb", "true").complaint()
    assert complaint.startswith("error: monitor.wandb needs wandb, ")
    assert "'puma-pipeline[wandb]'" in complaint
    assert not (tmp_path / "run").exists()


def test_what_is_measured_is_known_by_name() -> None:
    """What comparisons of runs leave out is no more than that."""
    assert all(
        map(is_measured, ["tokens_per_second", "ranks/data_wait_median", "unix_time", "time/training"])
    )
    assert not any(map(is_measured, ["loss", "progress/flops_per_step", "held_out/loss", "chains/stages"]))
