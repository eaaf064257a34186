"""The files of deploy/ against the project: what they copy, install, set and start."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from setuptools import build_meta
from torch.distributed.run import get_args_parser

from pipeline import config as configuration
from support.programs import ROOT

DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
DEFINITION = (ROOT / "deploy/puma.def").read_text()
INSTALL = (ROOT / "deploy/install.sh").read_text()


def copied_by_docker() -> list[str]:
    """Return the files that the image has when it installs the packages."""
    copies = re.findall(r"^COPY (.*)$", DOCKERFILE.split("RUN deploy/install.sh")[0], re.MULTILINE)
    return [name for line in copies for name in line.split()[:-1]]


def copied_by_apptainer() -> list[str]:
    section = DEFINITION.split("%files\n")[1].split("\n\n")[0]
    pairs = [line.split() for line in section.splitlines()]
    assert all(target == f"/opt/puma/{name}" for name, target in pairs)
    return [name for name, _ in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("names", [copied_by_docker(), copied_by_apptainer()], ids=["docker", "apptainer"])
def test_the_copied_files_suffice_to_install(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """make finds its files and installs the lock; setuptools finds what pyproject.toml names."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    assert os.access(tmp_path / "deploy/install.sh", os.X_OK)
    [make] = re.findall(r"^make .*$", INSTALL, re.MULTILINE)
    command = shlex.split(make)
    command.insert(1, "--dry-run")
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "/opt/venv/bin/python -m pip" in planned
    assert "-r requirements.txt" in planned
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    build_meta.prepare_metadata_for_build_wheel("out")
    assert "pipeline" in next((tmp_path / "out").glob("*/top_level.txt")).read_text().split()


def test_both_images_run_the_same_installation() -> None:
    assert len(re.findall(r"deploy/install\.sh$", DOCKERFILE, re.MULTILINE)) == 1
    assert len(re.findall(r"deploy/install\.sh$", DEFINITION, re.MULTILINE)) == 1
    for text in (DOCKERFILE, DEFINITION):
        assert "pip " not in text
        assert "apt-get" not in text
    [base] = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert f"BASE={base}\n" in DEFINITION


def test_the_caches_of_the_jobs_are_those_of_the_images() -> None:
    """Each can be written by every user, and a job's own folder wins."""
    caches = set(
        re.findall(r"\b(\w+_(?:CACHE|EXTENSIONS)_DIR)=", (ROOT / "slurm/pretrain.sbatch").read_text())
    )
    assert len(caches) == 3
    of_pyxis = re.search(r"--container-env=([\w,]+)", (ROOT / "slurm/site.env.example").read_text())
    assert of_pyxis is not None
    assert set(of_pyxis[1].split(",")) == caches
    for name in caches:
        assert re.search(rf"^ +{name}=/tmp/", DOCKERFILE, re.MULTILINE), name
        assert f'export {name}="${{{name}:-/tmp/' in DEFINITION, name


def test_what_git_ignores_is_in_no_image() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert ignored <= left_out


def test_the_job_starts_a_training_that_is_accepted() -> None:
    """By the parser of the settings; as the image's user, with every mount backed by a volume."""
    job: dict[str, Any] = yaml.safe_load((ROOT / "deploy/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    nodes = job["spec"]["pytorchReplicaSpecs"]
    assert nodes["Master"]["replicas"] == 1
    assert nodes["Master"]["template"] == nodes["Worker"]["template"]
    pod = nodes["Master"]["template"]["spec"]
    [user] = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert pod["securityContext"]["runAsUser"] == int(user) != 0
    [container] = pod["containers"]
    assert container["name"] == "pytorch"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}
    launch = get_args_parser().parse_args(container["command"][1:])
    assert (launch.module, launch.training_script) == (True, "pipeline.train")
    assert launch.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    config = configuration.load(launch.training_script_args)
    config.check()
    assert config.run_dir.startswith("/runs/")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("", "run python x.py"),
        ("apptainer exec --nv a.sif", "apptainer exec --nv a.sif python x.py"),
        ("--container-image=a.sqsh", "srun --ntasks=1 --container-image=a.sqsh python x.py"),
    ],
)
def test_a_step_starts_in_the_container(tmp_path: Path, container: str, expected: str) -> None:
    for name in ("apptainer", "srun", "python"):
        said = "run python" if name == "python" else name
        (tmp_path / name).write_text(f'#!/bin/bash\necho {said} "$@"\n')
        (tmp_path / name).chmod(0o755)
    script = 'source "$PUMA_CODE/slurm/stage.sh" merge; run_stage python x.py'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PUMA_CODE": str(tmp_path), "CONTAINER": container}
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "slurm/site.env").unlink(missing_ok=True)
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, expected)
