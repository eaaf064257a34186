"""Damage that sizes do not show is found wherever weights are read for a figure or a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.base import progress
from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.checkpoint.manifest import Damaged, check_files, find, read_manifest
from pipeline.ranks import Ranks
from support.programs import Outcome, run_here
from tools import evaluate, export_hf, generate

pytestmark = pytest.mark.slow

Train = Callable[..., Outcome]
SETTINGS = ["--train.steps", "4", "--optimizer.ema_decay", "0.9", "--evaluation.interval", "0"]
FOLDER = "checkpoints/step_00000004"


@pytest.fixture
def run_dir(template: Path, train: Train, tmp_path: Path) -> Path:
    """Return a copy of a run with a moving average."""
    if not template.exists():
        assert train(template, *SETTINGS).code == 0
    return Path(shutil.copytree(template, tmp_path / "run"))


def change_weight(path: Path) -> None:
    """Change a number of the first tensor in a file of torch.save, in place."""
    content = torch.load(path, weights_only=True)
    tensor = next(iter(content["model"].values())) if "model" in content else None
    if tensor is None:
        tensor = next(iter(content["pieces"].values()))["elements"]
    before = tensor.numpy().tobytes()[:64]
    data = path.read_bytes()
    assert before in data
    path.write_bytes(data.replace(before, before[:-1] + bytes([before[-1] ^ 1]), 1))


def outcomes(
    run_dir: Path, weights: str, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, Outcome]:
    """Return what each program says of a checkpoint."""
    items = run_dir.with_name("items.jsonl")
    items.write_text('{"prompt": "a", "answer": "b"}\n')
    output = run_dir.with_name(f"exported{len(more)}")
    programs: dict[str, tuple[Callable[..., None], list[str]]] = {
        "generate": (generate.main, ["--prompt", "a"]),
        "evaluate": (evaluate.main, ["--task", "exact", "--data", str(items)]),
        "likelihood": (evaluate.main, ["--task", "likelihood", "--data", str(items)]),
        "export": (export_hf.main, ["--output", str(output)]),
    }
    common = ["--checkpoint", str(run_dir), "--weights", weights, *more]
    return {name: run_here(main, [*common, *own], capsys) for name, (main, own) in programs.items()}


@pytest.mark.parametrize(
    ("weights", "file"), [("raw", "model/plain.pt"), ("ema", "model/ema_00000.pt"), ("raw", "tokenizer/")]
)
def test_every_program_refuses_changed_weights(
    run_dir: Path, weights: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And reads them when it is told to; an export that is refused leaves nothing."""
    if file == "tokenizer/":
        path = run_dir / FOLDER / "tokenizer/tokenizer.json"
        path.write_text(path.read_text().replace(" ", "\t", 1))
    else:
        change_weight(run_dir / FOLDER / file)
    for name, outcome in outcomes(run_dir, weights, capsys).items():
        line = outcome.complaint()
        assert f"{run_dir / FOLDER}: the content of {file}" in line, name
        assert "--no-verify" in line
    assert not run_dir.with_name("exported0").exists()
    for name, outcome in outcomes(run_dir, weights, capsys, "--no-verify").items():
        assert outcome.code == 0, (name, outcome.error)


def test_only_what_is_read_counts(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the average for the raw weights, nor the chains; a large checkpoint is not read in vain."""
    change_weight(run_dir / FOLDER / "model/ema_00000.pt")
    slots = run_dir / FOLDER / "slots_00000.npz"
    slots.write_bytes(bytes(slots.stat().st_size))
    for name, outcome in outcomes(run_dir, "raw", capsys).items():
        assert outcome.code == 0, (name, outcome.error)
    load_model(run_dir, torch.device("cpu"), untrained=True)
    with pytest.raises(UserError, match=r"ema_00000\.pt has changed"):
        load_model(run_dir, torch.device("cpu"))


def test_the_ranks_share_the_hashes(run_dir: Path) -> None:
    """Each file is hashed by exactly one of them."""
    folder = run_dir / FOLDER
    manifest = read_manifest(folder)
    for name in manifest.files:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        found = []
        for rank in range(3):
            try:
                check_files(folder, manifest, Ranks(rank, 3))
            except Damaged as error:
                found.append(str(error))
        assert len(found) == 1, name
        assert f"the content of {name} has changed" in found[0]
        (folder / name).write_bytes(content)


def test_progress_of_large_checkpoints(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr, so that texts on standard output stay alone; nothing for small ones."""
    options = ["--checkpoint", str(run_dir), "--prompt", "a", "--seed", "1"]
    quiet = run_here(generate.main, options, capsys)
    assert quiet.error == ""
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0)
    shown = run_here(generate.main, options, capsys)
    assert f"checking {run_dir / FOLDER}: " in shown.error
    assert shown.output == quiet.output


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_names_files_of_its_folder_only(run_dir: Path, name: str) -> None:
    path = run_dir / FOLDER / "manifest.json"
    values = json.loads(path.read_text())
    values["files"][name] = {"size": 1, "sha256": ""}
    del values["sha256"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is outside of the folder"):
        find(run_dir)


def test_a_checkpoint_takes_the_tokenizer_alone(data: Path, train: Train, tmp_path: Path) -> None:
    """Not what else is in its folder: links may lead to files that are not to be passed on."""
    folder = Path(shutil.copytree(data / "tokenizer", tmp_path / "tokenizer"))
    (tmp_path / "secret").write_text("of this machine")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "notes.txt").write_text("forgotten")
    assert train(tmp_path / "run", *SETTINGS, "--data.tokenizer", str(folder)).code == 0
    saved = sorted(path.name for path in (tmp_path / "run" / FOLDER / "tokenizer").iterdir())
    assert saved == ["tokenizer.json", "tokenizer.model"]
