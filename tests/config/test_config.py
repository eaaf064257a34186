"""The configuration: round trip, overrides, and one clear line for everything that can be wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline import config as configuration
from pipeline.base.errors import UserError

GOOD = {
    "run_dir": "runs/x",
    "data": {"prefixes": ["a", "b"], "kind": "pairs", "sequence_length": 32},
    "train": {"steps": 100, "global_batch_size": 8, "micro_batch_size": 2},
    "schedule": {"warmup_steps": 10},
}


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    return str(path)


def test_no_arguments_are_one_line() -> None:
    with pytest.raises(UserError, match="give --config"):
        configuration.load([])


def test_command_line_overrides_yaml(good: str) -> None:
    config = configuration.load(["--config", good, "--train.steps", "7", "--schedule.warmup_steps=1"])
    assert config.train.steps == 7
    assert config.schedule.warmup_steps == 1
    assert config.data.prefixes == ["a", "b"]


def test_a_list_of_sections_replaces_the_one_before_it(good: str, tmp_path: Path) -> None:
    """Nothing of an entry is left in the entry at its place; with + a list grows."""
    first = {"first_step": 5, "prefixes": ["a", "b"], "weights": [0.5, 0.5]}
    second = {"first_step": 7, "prefixes": ["c", "d"]}
    phases = tmp_path / "phases.yaml"
    phases.write_text(yaml.safe_dump({"data": {"phases": [first]}}))
    later = tmp_path / "later.yaml"
    later.write_text(yaml.safe_dump({"data": {"phases": [second]}}))
    files = ["--config", good, "--config", str(phases)]
    for arguments in (
        ["--config", str(later)],
        ["--data.phases", f"[{second}]"],
        [f"--data.phases=[{second}]"],
    ):
        (phase,) = configuration.load([*files, *arguments]).data.phases
        assert (phase.first_step, phase.prefixes, phase.weights) == (7, ["c", "d"], None)
    both = configuration.load([*files, f"--data.phases+={second}"]).data.phases
    assert [phase.weights for phase in both] == [[0.5, 0.5], None]


@pytest.mark.parametrize(
    "arguments",
    [
        "--objective.stages 12 --objective.stages_increment 3 --objective.stages_first_increase 60 "
        "--objective.stages_interval 30 --objective.stages_maximum 42 --objective.threshold 0.9",
        "--objective.kind random_masking --objective.mask_count bernoulli --objective.stratified true",
        "--objective.kind random_masking --objective.complementary true --objective.block_size 8",
        "--objective.random_share 0.2 --objective.complementary true --objective.policy margin",
        "--objective.kind autoregressive --model.prediction shifted --objective.switch_to puma "
        "--objective.switch_step 50 --objective.attention_annealing_steps 90",
        "--model.prediction shifted --objective.block_size 8 --objective.policy entropy",
    ],
)
def test_objectives_that_work(good: str, arguments: str) -> None:
    """Everything that docs/explanation/method.md offers is accepted, together where it goes together."""
    configuration.load(["--config", good, *arguments.split()])


@pytest.mark.parametrize(
    ("option", "answer"), [("--help", "--train.steps"), ("--evaluation.tasks.help", "tokens_per_step")]
)
def test_every_help_that_the_help_names(option: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        configuration.load([option])
    assert ended.value.code == 0
    assert answer in capsys.readouterr().out


def test_resolved_yaml_reads_back_equal(good: str, tmp_path: Path) -> None:
    config = configuration.load(
        ["--config", good, "--objective.threshold", "0.9", "--data.weights", "[1, 2]"]
    )
    written = tmp_path / "resolved.yaml"
    written.write_text(configuration.to_yaml(config))
    assert configuration.load(["--config", str(written)]) == config


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        *(
            (f"model: {value}", [f"model is {value}", "is a section"])
            for value in ("null", "[]", "5", "text")
        ),
        ("model:", ["model is null, but it is a section"]),
        ("model: &m {layers: *m}", ["a section holds itself, by an anchor"]),
        ("train: {steps: }", ["train.steps is null: it must be a whole number"]),
        ("train: {batch_ramp: null}", ["train.batch_ramp is null: it must be a list"]),
        ("evaluation: {tasks: [{task: exact, data: x, samples: null}]}", ["samples"]),
        (f"train: {{steps: {10**30}}}", [f"train.steps is {10**30}: give a whole number of 64 bits"]),
        ('engine: {deepspeed_config: "a\\0b"}', ["engine.deepspeed_config is 'a\\x00b'", "without NUL"]),
    ],
)
def test_values_that_nothing_can_hold(tmp_path: Path, more: str, parts: list[str]) -> None:
    """A section whose settings are all commented out is null; jsonargparse lets that pass."""
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: x\ndata: {{prefixes: [a]}}\n{more}\n")
    with pytest.raises(UserError) as refused:
        configuration.load(["--config", str(path)])
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "{layers: 2, unk: {}}", "command line: unknown key 'model.unk'"),
        ("--model", "null", "command line: model is null, but it is a section"),
        ("--model", "{layers: 2, layers: 3}", "--model is not valid YAML: 'layers' is given twice"),
        ("--model", "{x", "--model is not valid YAML"),
        ("--evaluation.tasks", "[{task: exact, data: x, unk: {}}]", "evaluation.tasks[0]: unknown key 'unk'"),
        ("--evaluation.tasks+", "{unk: {}}", "evaluation.tasks[0]: unknown key 'unk'"),
    ],
)
def test_sections_on_the_command_line(good: str, option: str, value: str, message: str) -> None:
    for arguments in ([option, value], [f"{option}={value}"]):
        with pytest.raises(UserError) as refused:
            configuration.load(["--config", good, *arguments])
        assert message in str(refused.value)
    assert configuration.load(["--config", good, "--model", "{layers: 3}"]).model.layers == 3


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("modle: {}", ["'modle'", "'model'"]),
        ("modle:", ["'modle'", "'model'"]),
        ("modle: {layers: {}}", ["'modle.layers'", "'model.layers'"]),
        ("model: {layerz: {}}", ["'model.layerz'", "'model.layers'"]),
        ("model: {layers: {many: {}}}", ["'model.layers.many'"]),
        ("1: {}", ["'1'"]),
        (
            "evaluation: {tasks: [{tusk: {}}]}",
            ["evaluation.tasks[0]", "'tusk'", "'task'", "Known: task, data"],
        ),
        (
            "evaluation: {tasks: [{task: exact, data: x}, {data: {x: 1}}]}",
            ["evaluation.tasks[1]", "'data.x'"],
        ),
        ("evaluation: {tasks: [{class_path: foreign.Task}]}", ["evaluation.tasks[0]", "'class_path'"]),
        ("evaluation: {class_path: foreign.Task}", ["'evaluation.class_path'"]),
    ],
)
def test_no_unknown_key_of_a_file_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, parts: list[str]
) -> None:
    """At any depth, also above an empty mapping; no module is imported because a file names it."""
    (tmp_path / "foreign.py").write_text("raise SystemExit('foreign code ran')")
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: x\ndata: {{prefixes: [a]}}\n{more}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as refused:
        configuration.load(["--config", str(path)])
    assert str(refused.value).startswith(f"{path}: ")
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train.stepz", "3"], ["'train.stepz'", "'train.steps'"]),
        (["--steps", "3"], ["'steps'", "'train.steps'"]),
        (["run.yaml"], ["unrecognized arguments: run.yaml", "by --config"]),
        (["--train.steps", "many"], ["train.steps is many", "a whole number"]),
        (["--train.log_samples", "maybe"], ["train.log_samples is maybe", "true or false"]),
        (["--optimizer.ema_decay", "x"], ["optimizer.ema_decay is x", "a number or null"]),
        (["--data.prefixes", "a"], ["data.prefixes is a", "a list, such as [a, b]"]),
        (["--data.weights", "1"], ["data.weights is 1", "a list, such as [1, 2] or null"]),
        (
            ["--evaluation.tasks", "[{task: exacto, data: x}]"],
            ["evaluation.tasks: task is exacto", "'exact'"],
        ),
        (
            ["--evaluation.tasks", "[{tusk: exact}]"],
            ["evaluation.tasks", "unknown key 'tusk'", "Did you mean 'task'", "tokens_per_step"],
        ),
        (["--evaluation.tasks", "{task: exact, data: x}"], ["a list, such as [{key: value}]"]),
        (["--train.steps", "0"], ["train.steps is 0", "above 0"]),
        (["--train.seed", "-1"], ["train.seed is -1"]),
        (["--objective.kind", "pumma"], ["objective.kind is pumma", "random_masking", "mean 'puma'"]),
        (["--objective.stages", "0"], ["objective.stages is 0"]),
        (["--objective.threshold", "1.5"], ["objective.threshold is 1.5", "between 0 and 1"]),
        (
            ["--objective.threshold", "0.9", "--objective.policy", "left_to_right"],
            ["objective.threshold is 0.9", "'left_to_right'", "null"],
        ),
        (["--objective.stages_increment", "3"], ["objective.stages_increment is 3", "stages_first_increase"]),
        (["--objective.stages_maximum", "9"], ["objective.stages_maximum is 9", "stages_increment is 0"]),
        (["--objective.stages_increment", "-1"], ["objective.stages_increment is -1", "only grows"]),
        (
            "--objective.stages_increment 1 --objective.stages_first_increase 5 "
            "--objective.stages_interval 5 --objective.stages_maximum 4".split(),
            ["objective.stages_maximum is 4", "below objective.stages = 8"],
        ),
        (["--objective.random_share", "1.0"], ["objective.random_share is 1.0", "random_masking"]),
        (
            ["--objective.kind", "random_masking", "--objective.threshold", "0.9"],
            ["objective.threshold is 0.9", "no effect", "'random_masking'", "puma"],
        ),
        (["--objective.mask_count", "bernoulli"], ["objective.mask_count is bernoulli", "no effect"]),
        (["--objective.stratified", "true"], ["objective.stratified is True", "no effect"]),
        (
            "--objective.kind random_masking --objective.mask_count bernoulli "
            "--objective.complementary true".split(),
            ["objective.complementary", "objective.mask_count", "uniform"],
        ),
        (
            ["--objective.mask_ratio_minimum", "0.6", "--objective.mask_ratio_maximum", "0.5"],
            ["objective.mask_ratio_minimum is 0.6", "objective.mask_ratio_maximum is 0.5"],
        ),
        (["--objective.mask_ratio_std", "0"], ["objective.mask_ratio_std is 0.0", "null"]),
        (["--objective.mask_ratio_mean", "0.4"], ["objective.mask_ratio_mean is 0.4", "mask_ratio_std"]),
        (
            ["--objective.mask_ratio_mean", "3", "--objective.mask_ratio_std", "0.2"],
            ["objective.mask_ratio_mean is 3.0", "closer"],
        ),
        (
            "--objective.kind random_masking --objective.mask_count bernoulli "
            "--objective.mask_ratio_std 0.2".split(),
            ["objective.mask_ratio_std", "objective.mask_count = 'bernoulli'", "uniform"],
        ),
        (
            "--objective.kind random_masking --objective.mask_ratio_weighted true".split(),
            ["objective.mask_ratio_weighted is true", "objective.mask_ratio_std"],
        ),
        (
            "--objective.kind random_masking --objective.mask_ratio_weighted true "
            "--objective.mask_ratio_std 0.2 --objective.complementary true".split(),
            ["objective.mask_ratio_weighted", "objective.complementary"],
        ),
        (
            "--objective.mask_ratio_weighted true --objective.mask_ratio_std 0.2".split(),
            ["objective.mask_ratio_weighted is True", "no effect"],
        ),
        (["--objective.stages_skipped", "-1"], ["objective.stages_skipped is -1"]),
        (["--objective.reveal_pool", "1"], ["objective.reveal_pool is 1.0", "random"]),
        (
            ["--objective.reveal_pool", "0.5", "--objective.policy", "random"],
            ["objective.reveal_pool is 0.5", "'random'"],
        ),
        (["--objective.switch_to", "random_masking"], ["objective.switch_step is None", "give both"]),
        (
            ["--objective.switch_to", "puma", "--objective.switch_step", "5"],
            ["objective.switch_to is puma", "objective.kind itself"],
        ),
        (
            ["--objective.switch_to", "random_masking", "--objective.switch_step", "101"],
            ["objective.switch_step is 101", "train.steps = 100"],
        ),
        (["--objective.kind", "autoregressive"], ["model.prediction is 'same'", "shifted"]),
        (["--objective.block_size", "32"], ["objective.block_size is 32", "data.sequence_length = 32"]),
        (
            "--objective.kind autoregressive --model.prediction shifted --objective.block_size 4".split(),
            ["objective.block_size is 4", "no effect"],
        ),
        (
            ["--objective.block_size", "4", "--objective.attention_annealing_steps", "9"],
            ["objective.attention_annealing_steps is 9", "objective.block_size is 4"],
        ),
        (
            ["--objective.attention_annealing_steps", "-9"],
            ["objective.attention_annealing_steps is -9", "0 or more"],
        ),
        (["--model.heads", "3"], ["model.hidden_size is 128", "2 x model.heads = 6"]),
        (["--model.head_size", "7"], ["model.head_size is 7", "even"]),
        (["--model.rope_factor", "0.5"], ["model.rope_factor is 0.5", "1 (none)"]),
        (["--model.kv_heads", "3"], ["model.kv_heads is 3", "divide model.heads = 4"]),
        (["--data.prefixes", "[]"], ["data.prefixes is empty"]),
        (["--data.weights", "[1]"], ["data.weights is [1.0]", "2 data.prefixes"]),
        (["--data.split", "98,2"], ["data.split is '98,2'", "three shares"]),
        (["--data.workers", "-1"], ["data.workers is -1"]),
        (["--optimizer.beta2", "1"], ["optimizer.beta2 is 1.0"]),
        (["--optimizer.learning_rate", "0"], ["optimizer.learning_rate is 0.0"]),
        (["--optimizer.ema_decay", "1"], ["optimizer.ema_decay is 1.0", "0.9999", "null"]),
        (["--optimizer.gradient_clip", "-1"], ["optimizer.gradient_clip is -1.0"]),
        (["--schedule.warmup_steps", "200"], ["schedule.warmup_steps", "train.steps = 100"]),
        (["--schedule.final_ratio", "2"], ["schedule.final_ratio is 2.0"]),
        (["--guard.spike_limit", "-1"], ["guard.spike_limit is -1.0", "0 or more"]),
        (["--guard.skips_before_rollback", "0"], ["guard.skips_before_rollback is 0"]),
        (["--guard.max_rollbacks", "-1"], ["guard.max_rollbacks is -1"]),
        (["--watchdog.factor", "-1"], ["watchdog.factor is -1.0"]),
        (["--watchdog.minimum", "0"], ["watchdog.minimum is 0.0"]),
        (["--checkpoint.keep", "0"], ["checkpoint.keep is 0"]),
        (["--evaluation.interval", "-5"], ["evaluation.interval is -5"]),
        (["--evaluation.bound_draws", "3"], ["evaluation.bound_draws is 3", "even"]),
        (["--monitor.texts", "-1"], ["monitor.texts is -1"]),
        (["--monitor.wandb_project", ""], ["monitor.wandb_project is empty"]),
        (["--profiling.flops_step", "-1"], ["profiling.flops_step is -1"]),
        (
            ["--profiling.flops_step", "3", "--engine.compile", "true"],
            ["profiling.flops_step is 3", "engine.compile is true"],
        ),
        (
            ["--engine.kind", "plain", "--profiling.communication_steps", "3"],
            ["profiling.communication_steps is 3", "engine.kind is 'plain'"],
        ),
        (["--profiling.trace_steps", "[1, 3]"], ["profiling.trace_steps is [1, 3]", "from 2"]),
        (["--profiling.trace_steps", "[10]"], ["profiling.trace_steps is [10]", "the first and the last"]),
        (["--profiling.trace_steps", "[9, 101]"], ["profiling.trace_steps is [9, 101]", "train.steps = 100"]),
        (
            ["--profiling.memory_snapshot", "true", "--engine.device", "cpu"],
            ["profiling.memory_snapshot is true", "engine.device is 'cpu'"],
        ),
        (["--engine.sequence_parallel_size", "0"], ["engine.sequence_parallel_size is 0"]),
        (["--engine.sequence_parallel_size", "3"], ["model.heads = 4"]),
        (["--engine.sequence_parallel_size", "2", "--model.kv_heads", "1"], ["model.kv_heads = 1"]),
        (
            ["--engine.sequence_parallel_size", "2", "--data.sequence_length", "33"],
            ["engine.sequence_parallel_size is 2", "data.sequence_length = 33"],
        ),
        (["--engine.kind", "plain", "--engine.sequence_parallel_size", "2"], ["engine.kind is 'plain'"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
    ],
)
def test_bad_settings_are_one_line_with_key_and_value(
    good: str, arguments: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        configuration.load(["--config", good, *arguments])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("run_dir: x\ntrain: {stepz: 3}\n", ["unknown key 'train.stepz'", "'train.steps'"]),
        ("run_dir: x\nobjectives: {kind: puma}\n", ["unknown key 'objectives.kind'", "'objective.kind'"]),
        ("run_dir: [\n", ["line", "not valid YAML"]),
        ("run_dir: x\ntrain: {steps: 3}\ntrain: {seed: 1}\n", ["line 3", "'train' is given twice"]),
        ("just text\n", ["holds no settings"]),
        ("train: {steps: 3}\n", ["run_dir"]),
    ],
)
def test_bad_yaml_is_one_line_with_file(tmp_path: Path, content: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        configuration.load(["--config", str(path)])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_global_batch_must_divide(good: str) -> None:
    train = configuration.load(["--config", good]).train
    assert [train.accumulation(world_size) for world_size in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(
        UserError, match=r"train.global_batch_size = 8 .*over 3 ranks: start 1, 2, 4, 8 ranks"
    ):
        train.fitted(3)


def test_the_micro_batch_fits_the_number_of_ranks(good: str) -> None:
    """The global batch stays: the micro-batch is lowered only where it does not divide a rank's share."""
    train = configuration.load(["--config", good, "--train.global_batch_size", "24"]).train
    train.micro_batch_size = 4
    for ranks, micro_batch, accumulation in [
        (1, 4, 6),
        (2, 4, 3),
        (4, 3, 2),
        (8, 3, 1),
        (12, 2, 1),
        (24, 1, 1),
    ]:
        fitted = train.fitted(ranks)
        assert (fitted.micro_batch_size, fitted.accumulation(ranks)) == (micro_batch, accumulation)
