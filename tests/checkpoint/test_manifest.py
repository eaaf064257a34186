"""Validation of checkpoints: damage, mismatched settings, and the messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import FORMAT, Damaged, Manifest, find, read_manifest
from support.programs import Outcome

pytestmark = pytest.mark.slow

Train = Callable[..., Outcome]
NEWEST = "checkpoints/step_00000016"
SHORT = ["--evaluation.interval", "0", "--checkpoint.interval", "8"]


@pytest.fixture
def run_dir(template: Path, train: Train, tmp_path: Path) -> Path:
    """Return a copy of a run with checkpoints of steps 8 and 16."""
    if not template.exists():
        assert train(template, *SHORT).code == 0
    return Path(shutil.copytree(template, tmp_path / "run"))


def corrupt(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_step(folder: Path) -> None:
    """Change one bit of a manifest, so that it is valid JSON with another step."""
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 16,', b'"step": 17,'))


def change_manifest(path: Path, **values: object) -> None:
    """Change values of a manifest; drop its own hash, as in manifests of older versions."""
    manifest = json.loads(path.read_text()) | values
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "6"),
        ("step", -1),
        ("world_size", 10**30),
        ("tokens", None),
        ("vocabulary", {}),
        ("vocabulary", None),
        ("vocabulary", {"rows": 9, "tokens": 10, "mask_id": 3}),
        ("vocabulary", {"rows": 10, "tokens": 10, "mask_id": -1}),
        ("vocabulary", {"rows": 10, "tokens": 10, "mask_id": 10}),
        ("files", []),
    ],
)
def test_numbers_that_no_checkpoint_has(tmp_path: Path, name: str, value: object) -> None:
    """An edited manifest without a hash of its own, as older versions wrote it."""
    path = tmp_path / "manifest.json"
    vocabulary = {"rows": 10, "tokens": 10, "mask_id": 3}
    path.write_bytes(Manifest(FORMAT, 6, 5, 1, "none", 1, vocabulary, "").to_json())
    assert read_manifest(tmp_path).step == 6
    change_manifest(path, **{name: value})
    with pytest.raises(Damaged, match="cannot be read"):
        read_manifest(tmp_path)


def test_the_manifest_describes_every_file(run_dir: Path) -> None:
    """Sizes and hashes equal those of the standard library; metadata equals the run's."""
    folder = run_dir / NEWEST
    manifest = json.loads((folder / "manifest.json").read_text())
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    del found["manifest.json"]
    assert set(manifest["files"]) == set(found)
    for name, path in found.items():
        content = path.read_bytes()
        facts = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert manifest["files"][name] == facts
    assert (manifest["step"], manifest["tokens"], manifest["world_size"]) == (16, 16 * 16 * 12, 1)
    assert (manifest["global_batch_size"], manifest["sharding"]) == (16, "none")
    assert {"torch", "deepspeed"} <= set(manifest["versions"])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: corrupt(f / "model/plain.pt"), "the content of model/plain.pt has changed"),
        (lambda f: corrupt(f / "slots_00000.npz"), "the content of slots_00000.npz has changed"),
        (lambda f: os.truncate(f / "model/plain.pt", 1000), "model/plain.pt has 1,000 bytes, but"),
        (lambda f: (f / "slots_00000.npz").unlink(), "slots_00000.npz is missing"),
        (flip_step, "the content of its manifest.json has changed"),
        (lambda f: os.truncate(f / "manifest.json", 50), "its manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), "its manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    ],
    ids=[
        "shard",
        "slots",
        "short-shard",
        "missing",
        "manifest",
        "short-manifest",
        "other-manifest",
        "no-manifest",
    ],
)
def test_a_broken_checkpoint_is_skipped_with_the_reason(
    train: Train, run_dir: Path, damage: Callable[[Path], None], reason: str
) -> None:
    """The run resumes from the older checkpoint and replaces the broken one."""
    before = (run_dir / NEWEST / "model/plain.pt").read_bytes()
    damage(run_dir / NEWEST)
    outcome = train(run_dir, *SHORT)
    assert outcome.code == 0
    lines = [line for line in outcome.output.splitlines() if line.startswith("skipped ")]
    assert len(lines) == 1
    assert f"{run_dir / NEWEST}: {reason}" in lines[0]
    assert "(step 8)" in outcome.output
    assert (run_dir / NEWEST / "model/plain.pt").read_bytes() == before, "repeated bit for bit"
    assert "skipped" not in train(run_dir, *SHORT).output, "the replacement is whole"


def test_tools_find_what_is_whole(run_dir: Path) -> None:
    """`find` takes a run (its newest complete checkpoint), a checkpoint folder, or a copy with any name."""
    assert find(run_dir)[0] == run_dir / NEWEST
    copy = shutil.copytree(run_dir / NEWEST, run_dir.with_name("best"))
    assert find(copy)[1].step == 16
    (run_dir / NEWEST / "model/plain.pt").unlink()
    assert find(run_dir)[1].step == 8
    for path, problem in [
        (run_dir / NEWEST, "model/plain.pt is missing"),
        (run_dir.with_name("nowhere"), "holds no checkpoint"),
        (run_dir / "checkpoints/step_00000099", "holds no checkpoint"),
        (f"{run_dir}:999", "has no checkpoint of step 999: choose from .*8, .*16"),
    ]:
        with pytest.raises(UserError, match=problem):
            find(Path(path))


def test_hashes_can_be_left_out(train: Train, run_dir: Path) -> None:
    corrupt(run_dir / NEWEST / "tokenizer/tokenizer.model")
    outcome = train(run_dir, *SHORT, "--checkpoint.verify_hashes", "false")
    assert "skipped" not in outcome.output
    assert "(step 16)" in outcome.output


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(train: Train, run_dir: Path) -> None:
    """A fresh start in the same folder would overwrite checkpoints that may still be restored."""
    for path in run_dir.glob("checkpoints/*/manifest.json"):
        path.unlink()
    metrics = (run_dir / "metrics.jsonl").read_bytes()
    complaint = train(run_dir, *SHORT).complaint()
    assert f"{run_dir} has 2 checkpoints and none is complete" in complaint
    assert "run_dir" in complaint
    assert (run_dir / "metrics.jsonl").read_bytes() == metrics


def test_an_unknown_format_is_refused(train: Train, run_dir: Path) -> None:
    """Resuming from an older checkpoint would silently lose steps."""
    path = run_dir / NEWEST / "manifest.json"
    change_manifest(path, format=99)
    assert f"{path} has format 99, this program reads" in train(run_dir, *SHORT).complaint()


def test_another_engine_is_refused(train: Train, run_dir: Path) -> None:
    path = run_dir / NEWEST / "manifest.json"
    change_manifest(path, sharding="zero2")
    assert "engine.kind = deepspeed, the run has plain" in train(run_dir, *SHORT).complaint()


def test_damaged_lines_of_the_curves_do_not_keep_a_run_from_going_on(train: Train, run_dir: Path) -> None:
    """A power loss may leave zeros instead of lines that were not yet synced."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines + bytes(20) + b"\n" + bytes(7))
    outcome = train(run_dir, *SHORT)
    assert outcome.code == 0
    assert f"{path}, line {lines.count(10) + 1} is damaged" in outcome.output
    assert path.read_bytes() == lines


@pytest.mark.parametrize(
    ("key", "then", "now"),
    [
        ("data.split", "80,20,0", "50,50,0"),
        ("data.padding", "ignored", "eos_targets"),
        ("optimizer.decay_norms_and_embeddings", "False", "True"),
    ],
)
def test_another_setting_is_named(train: Train, run_dir: Path, key: str, then: str, now: str) -> None:
    """The refused start changes nothing in the folder."""
    order = (run_dir / "data_order.json").read_bytes()
    assert f"{key} = {then}, the run has {now}" in train(run_dir, *SHORT, f"--{key}", now).complaint()
    assert (run_dir / "data_order.json").read_bytes() == order


def test_other_content_of_the_data_is_refused(train: Train, run_dir: Path) -> None:
    path = run_dir / NEWEST / "manifest.json"
    change_manifest(path, data_fingerprint="0" * 64)
    assert "the content of data.prefixes = 000000000000, the run has" in train(run_dir, *SHORT).complaint()


def test_fewer_steps_than_are_done_are_refused(train: Train, run_dir: Path) -> None:
    """Otherwise the run would exit with the requeue code forever."""
    complaint = train(run_dir, *SHORT, "--train.steps", "10").complaint()
    assert f"train.steps is 10, but {run_dir / NEWEST} is already at step 16" in complaint


def test_what_a_killed_process_left_is_cleared(train: Train, run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for name in (".writing_00000016", ".removing_step_00000004"):
        (folder / name).mkdir()
        (folder / name / "manifest.json").touch()
    assert train(run_dir, *SHORT).code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000008", "step_00000016"]


def test_optimizer_settings_of_the_configuration_count(train: Train, run_dir: Path) -> None:
    """A checkpoint restores the optimizer's state, not its settings, so a resumed run may change them."""
    shutil.rmtree(run_dir / NEWEST)
    same = shutil.copytree(run_dir, run_dir.with_name("same"))
    for folder, decay in ((run_dir, "0.5"), (same, "0.01")):
        assert train(folder, *SHORT, "--optimizer.weight_decay", decay).code == 0
    weights = [(folder / NEWEST / "model/plain.pt").read_bytes() for folder in (run_dir, same)]
    assert weights[0] != weights[1]
