"""Every wrong run is refused before anything starts, by one line with file, key, value and remedy."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.deepspeed import settings as deepspeed_settings
from pipeline.training.preflight import check_run
from support.programs import ROOT, Outcome

ZERO = {"stage": 3, "reduce_bucket_size": 1000}


@dataclass(frozen=True)
class Wrong:
    """A change of a good run, and what its error must say besides the file.

    Attributes:
        key: what the error names.
        value: how it shows the value.
        remedy: a word of the remedy.
        yaml: sections of the YAML, merged into the good ones.
        zero: keys of zero_optimization.
        top: keys beside it.
        ranks: world size.
    """

    key: str
    value: str
    remedy: str
    yaml: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


NVME = {"offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}
WRONG = [
    # YAML: unknown keys
    Wrong("trian.steps", "trian", "Did you mean 'train.steps'", {"trian": {"steps": 3}}),
    Wrong("train.setps", "setps", "Did you mean 'train.steps'", {"train": {"setps": 3}}),
    Wrong(
        "optimizer.learning_rat",
        "learning_rat",
        "'optimizer.learning_rate'",
        {"optimizer": {"learning_rat": 1}},
    ),
    Wrong("checkpoint.keep_evry", "keep_evry", "'checkpoint.keep_every'", {"checkpoint": {"keep_evry": 4}}),
    # YAML: values
    Wrong("train.steps", "many", "a whole number", {"train": {"steps": "many"}}),
    Wrong("optimizer.learning_rate", "3.0", "0.1 or less", {"optimizer": {"learning_rate": 3}}),
    Wrong("optimizer.learning_rate", "-0.1", "above 0", {"optimizer": {"learning_rate": -0.1}}),
    Wrong("optimizer.weight_decay", "1000.0", "Lower it", {"optimizer": {"weight_decay": 1000}}),
    Wrong("optimizer.beta1", "1.0", "below 1", {"optimizer": {"beta1": 1}}),
    Wrong("schedule.warmup_steps", "90", "train longer", {"schedule": {"warmup_steps": 90}}),
    Wrong("schedule.decay_steps", "5", "'wsd'", {"schedule": {"decay_steps": 5}}),
    Wrong("schedule.decay_shape", "1-sqrt", "'wsd'", {"schedule": {"decay_shape": "1-sqrt"}}),
    Wrong(
        "schedule.warmup_steps", "0", "give some", {"schedule": {"kind": "inverse_sqrt", "warmup_steps": 0}}
    ),
    Wrong(
        "schedule.final_ratio",
        "0.6",
        "or less",
        {"schedule": {"kind": "inverse_sqrt", "warmup_steps": 1, "decay_steps": 1, "final_ratio": 0.6}},
    ),
    Wrong("schedule.final_ratio", "1.5", "between 0 and 1", {"schedule": {"final_ratio": 1.5}}),
    Wrong("model.init_std", "1.0", "0.02", {"model": {"init_std": 1.0}}),
    Wrong("watchdog.factor", "0.5", "more than 1", {"watchdog": {"factor": 0.5}}),
    # YAML: sizes that do not divide
    Wrong("model.hidden_size", "100", "multiple", {"model": {"hidden_size": 100, "heads": 8}}),
    Wrong("model.kv_heads", "3", "divide model.heads", {"model": {"kv_heads": 3}}),
    Wrong(
        "engine.sequence_parallel_size", "8", "divide model.heads", {"engine": {"sequence_parallel_size": 8}}
    ),
    Wrong("checkpoint.keep_every", "15", "multiple", {"checkpoint": {"interval": 10, "keep_every": 15}}),
    # YAML: contradictions
    Wrong("data.temperature", "2.0", "keep one of them", {"data": {"temperature": 2, "weights": [1]}}),
    Wrong("data.prefixes", "pairs", "once", {"data": {"prefixes": ["pairs", "pairs"]}}),
    Wrong("data.padding", "'eos_targets'", "'pairs'", {"data": {"kind": "packed", "padding": "eos_targets"}}),
    Wrong(
        "objective.threshold",
        "0.9",
        "random_masking",
        {"objective": {"kind": "random_masking", "threshold": 0.9}},
    ),
    Wrong(
        "checkpoint.keep_best", "2", "evaluation.interval", {"checkpoint": {"keep_best": 2, "interval": 7}}
    ),
    # the data
    Wrong("data.kind", "'packed'", "'pairs'", {"data": {"kind": "packed"}}),
    Wrong("train.global_batch_size", "64", "lower the batch", {"train": {"global_batch_size": 64}}),
    Wrong("data.sequence_length", "12 tokens", "raise it", {"data": {"sequence_length": 4}}),
    Wrong("data.split", "'99,0,1'", "larger share", {"data": {"split": "99,0,1"}}),
    # the disk
    Wrong(
        "run_dir", "has 9.00B free", "checkpoint.keep", {"checkpoint": {"keep": 7, "interval": 10}}, ranks=0
    ),
    # DeepSpeed's JSON: unknown keys, at any depth
    Wrong("gradient_cliping", "gradient_cliping", "ignore", top={"gradient_cliping": 1}),
    Wrong("zero_optimisation", "zero_optimisation", "'zero_optimization'", top={"zero_optimisation": {}}),
    Wrong("zero_optimization.overlap_com", "overlap_com", "'overlap_comm'", zero={"overlap_com": True}),
    Wrong(
        "zero_optimization.offload_optimizer.pin_memry",
        "pin_memry",
        "'pin_memory'",
        zero={"offload_optimizer": {"device": "cpu", "pin_memry": True}},
    ),
    Wrong(
        "checkpoint.writer.decoupld",
        "decoupld",
        "'decoupled'",
        top={"checkpoint": {"writer": {"decoupld": True}}},
    ),
    Wrong("aio.block_sise", "block_sise", "'block_size'", top={"aio": {"block_sise": 4096}}),
    Wrong(
        "data_types.grad_accum_dtyp",
        "dtyp",
        "'grad_accum_dtype'",
        top={"data_types": {"grad_accum_dtyp": "fp32"}},
    ),
    # DeepSpeed's JSON: values
    Wrong("zero_optimization.reduce_bucket_size", "'big'", "integer", zero={"reduce_bucket_size": "big"}),
    Wrong("zero_optimization.stage", "5", "1, 2 or 3", zero={"stage": 5}),
    Wrong("communication_data_type", "'fp8'", "'bf16'", top={"communication_data_type": "fp8"}),
    Wrong(
        "data_types.grad_accum_dtype", "'fp16'", "'bf16'", top={"data_types": {"grad_accum_dtype": "fp16"}}
    ),
    Wrong(
        "data_types.grad_accum_dtype",
        "'bf16'",
        "engine.precision",
        {"engine": {"precision": "fp32"}},
        top={"data_types": {"grad_accum_dtype": "bf16"}},
    ),
    Wrong("zero_optimization.stage", "1", "stage to 2", {"engine": {"precision": "bf16"}}, zero={"stage": 1}),
    Wrong(
        "zero_optimization.zero_hpz_partition_size",
        "4",
        "divide the 6 ranks",
        zero={"zero_hpz_partition_size": 4},
        ranks=6,
    ),
    Wrong("aio", "[1]", "JSON object", top={"aio": [1]}),
    Wrong("compile", "'compile'", "engine.compile", top={"compile": {"deepcompile": True}}),
    # DeepSpeed's JSON: contradictions
    Wrong(
        "stage3_max_live_parameters", "5", "stage to 3", zero={"stage": 2, "stage3_max_live_parameters": 5}
    ),
    Wrong("zero_hpz_partition_size", "4", "stage to 3", zero={"stage": 2, "zero_hpz_partition_size": 4}),
    Wrong(
        "offload_param.device", "'cpu'", "stage to 3", zero={"stage": 2, "offload_param": {"device": "cpu"}}
    ),
    Wrong(
        "offload_param.device", "'cpu'", "Add offload_optimizer", zero={"offload_param": {"device": "cpu"}}
    ),
    Wrong("nvme_path", "None", "give a folder", zero={"offload_optimizer": {"device": "nvme"}}),
    Wrong("optimizer.ema_decay", "'nvme'", "to null", {"optimizer": {"ema_decay": 0.99}}, zero=NVME),
    Wrong(
        "zero_quantized_weights",
        "'cpu'",
        "Set them to false",
        {"engine": {"device": "cpu"}},
        zero={"zero_quantized_weights": True},
    ),
    Wrong("'optimizer'", "optimizer", "set the optimizer section", top={"optimizer": {"type": "Adam"}}),
    Wrong("'bf16'", "bf16", "engine.precision", top={"bf16": {"enabled": True}}),
    Wrong(
        "evaluation.tasks[0].data",
        "/nowhere.jsonl",
        "Name the file",
        {"evaluation": {"tasks": [{"task": "exact", "data": "/nowhere.jsonl"}]}},
    ),
    Wrong("model.vocab_size", "8", "or leave it out", {"model": {"vocab_size": 8}}),
    Wrong(
        "train.initial_weights", "/nowhere", "tools/export_hf.py", {"train": {"initial_weights": "/nowhere"}}
    ),
]


def merged(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    return one | {k: merged(one[k], v) if k in one and isinstance(v, dict) else v for k, v in two.items()}


def check(data: Path, folder: Path, wrong: Wrong) -> None:
    """Load and check the good run with a change."""
    settings = folder / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": ZERO | wrong.zero} | wrong.top))
    good = {
        "run_dir": str(folder / "run"),
        "data": {"tokenizer": str(data / "tokenizer"), "prefixes": [str(data / "pairs")], "kind": "pairs",
                 "sequence_length": 12},
        "model": {"layers": 2, "hidden_size": 32, "intermediate_size": 64},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 80, "global_batch_size": 16, "micro_batch_size": 4},
        "engine": {"deepspeed_config": str(settings)},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(merged(good, wrong.yaml)))
    config = configuration.load(["--config", str(path)])
    check_run(config, Tokenizer.load(data / "tokenizer"), wrong.ranks or None)


def test_the_good_run_is_accepted(data: Path, tmp_path: Path) -> None:
    check(data, tmp_path, Wrong("", "", ""))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave 9 bytes free, or so it seems."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 9, 9))


def test_a_run_with_checkpoints_resumes_on_a_full_disk(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be full for a while only, and exit code 2 would keep the job from being requeued."""
    fill_disk(monkeypatch)
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / MANIFEST).touch()
    check(data, tmp_path, Wrong("", "", ""))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.key} {wrong.remedy}")
def test_a_wrong_run_is_refused(
    data: Path, tmp_path: Path, wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong.key == "run_dir":
        fill_disk(monkeypatch)
    with pytest.raises(UserError) as caught:
        check(data, tmp_path, wrong)
    message = str(caught.value)
    assert "\n" not in message
    file = str(tmp_path / ("ds.json" if wrong.zero or wrong.top else "run"))
    if wrong.key in ("data.kind", "data.sequence_length", "data.split", "train.global_batch_size"):
        file = str(data / "pairs")
    if wrong.key == "model.vocab_size":
        file = str(data / "tokenizer")
    if wrong.key in ("evaluation.tasks[0].data", "train.initial_weights"):
        file = wrong.value
    for part in (file, wrong.key, wrong.value, wrong.remedy):
        assert part in message, message


def test_there_are_more_than_thirty() -> None:
    assert len({(wrong.key, wrong.remedy) for wrong in WRONG}) == len(WRONG) > 40


def test_the_keys_of_the_json_are_deepspeeds() -> None:
    """Every listed name occurs in DeepSpeed's own code that reads its configuration."""
    import deepspeed

    folder = Path(deepspeed.__file__).parent
    sources = [folder / "runtime" / name for name in ("constants.py", "config.py")]
    sources += [*folder.glob("**/config.py"), *folder.glob("**/*constants.py")]
    text = "\n".join(path.read_text() for path in sources)
    for name in (*deepspeed_settings.OWN_KEYS, *deepspeed_settings.YAML_KEYS, *deepspeed_settings.CHECKPOINT,
                 *deepspeed_settings.DATA_TYPES):  # fmt: skip
        assert f'"{name}"' in text or f"'{name}'" in text, name


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_settings_are_accepted(path: Path) -> None:
    assert deepspeed_settings.read_deepspeed_json(path)["zero_optimization"]["stage"] in (1, 2, 3)


def test_what_is_refused_is_refused_before_samples_are_built(
    data: Path, train: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Building the indices of a large corpus takes long; a resumed run may need new ones."""
    items = tmp_path / "items.jsonl"
    items.write_text('{"prompt": "abc"}\n')
    tasks = json.dumps([{"task": "exact", "data": str(items)}])
    folder = tmp_path / "run"
    wrong = {
        "items.jsonl, line 1: no key 'answer'": ("--evaluation.tasks", tasks),
        "config.json is missing": ("--train.initial_weights", str(tmp_path / "nowhere")),
        "gives no validation example": ("--data.split", "1,0,0"),
        "data.sequence_length = 8": ("--data.sequence_length", "8"),
    }
    for message, change in wrong.items():
        assert message in train(folder, *change).complaint()
        assert not (folder / "dataset_cache").exists()
    assert train(folder, "--train.steps", "4").code == 0
    built = sorted((folder / "dataset_cache").iterdir())
    assert "data.split = 80,20,0, the run has 70,30,0" in train(folder, "--data.split", "70,30,0").complaint()
    assert sorted((folder / "dataset_cache").iterdir()) == built
