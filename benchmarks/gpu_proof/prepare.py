"""Collect what a GPU machine without network lacks, on a machine with the project (`make install`).

usage: python -m benchmarks.gpu_proof.prepare --present FILE [--python 3.12] [--folder .gpu]

FILE is what `python3 -m pip list --format=freeze` prints on the GPU machine. What is missing there is
downloaded as wheels, in the versions installed here. Carry the project with the folder .gpu, and run
`bash benchmarks/gpu_proof/offline.sh` there: it unpacks them into a temporary folder and starts the proof.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import Failure, UserError

PROJECT = "puma-pipeline"
ROOTS = (PROJECT, "pytest", "pytest-timeout")
FOUNDATION = ("torch",)  # never carried: gigabytes that must fit the driver
BUILT_HERE = ("deepspeed",)  # offered as source only; its wheel holds no compiled code
GLIBC = (17, 24, 27, 28, 31, 34)  # of manylinux_2_N
About = Callable[[str], tuple[str, Sequence[str]]]


def installed(name: str) -> tuple[str, Sequence[str]]:
    """Return version and requirements of a package that is installed here."""
    found = distribution(name)
    return found.version, found.requires or []


def read_present(text: str) -> dict[str, str]:
    """Return the versions by name of lines NAME==VERSION; local parts (+cu130) are left out."""
    pairs = (line.strip().split("==") for line in text.splitlines() if "==" in line)
    return {canonicalize_name(name): version.split("+")[0] for name, version in pairs}


def missing(
    roots: Sequence[str], present: Mapping[str, str], python: str, about: About = installed
) -> dict[str, str]:
    """Return the versions by name of all that `roots` need, and a machine does not have.

    Args:
        roots: names of packages.
        present: versions by name on that machine; what these need is there, too.
        python: its version, such as 3.12.
        about: gives version and requirements of a package.
    """
    found: dict[str, str] = {}
    queue, seen = [Requirement(name) for name in roots], set()
    while queue:
        each = queue.pop()
        name = canonicalize_name(each.name)
        if name in present and each.specifier.contains(present[name], prereleases=True):
            continue
        if (name, *sorted(each.extras)) in seen:
            continue
        seen.add((name, *sorted(each.extras)))
        found[name], requires = about(name)
        parts = [Requirement(line) for line in requires]
        queue += [part for part in parts if _applies(part, python, each.extras or {""})]
    return found


def _applies(requirement: Requirement, python: str, extras: set[str]) -> bool:
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    marker = requirement.marker
    return marker is None or any(marker.evaluate(where | {"extra": extra}) for extra in extras)


def collect(versions: Mapping[str, str], python: str, folder: Path) -> None:
    """Download the wheels, and build those that are offered as source only.

    Raises:
        Failure: when pip fails; it says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pins = {name: f"{name}=={version}" for name, version in versions.items()}
    built = [pins[name] for name in BUILT_HERE if name in pins]
    loaded = [pin for name, pin in pins.items() if name not in BUILT_HERE]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + [
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
    ]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [part for platform in platforms for part in ("--platform", platform)]
    if loaded:
        pip("download", "--no-deps", *target, "-d", str(folder), *loaded)
    if built:
        pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), *built)


def pip(*arguments: str) -> None:
    """Run pip; nothing is compiled."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}).returncode:
        raise Failure(f"pip {arguments[0]} failed, see above.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the wheels, and print their number and size."""
    parser = ToolParser((__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--present", type=Path, required=True, help="pip list --format=freeze of that machine"
    )
    parser.add_argument("--python", default="3.12", help="its version of Python")
    parser.add_argument("--folder", type=Path, default=Path(".gpu"), help="gets wheels/")
    options = parser.parse_args(arguments)
    versions = missing(ROOTS, read_present(options.present.read_text()), options.python)
    versions.pop(PROJECT)
    for name in FOUNDATION:
        if name in versions:
            raise UserError(
                f"--present {options.present} names no {name} in the range of pyproject.toml: install it on "
                "the GPU machine, for its driver."
            )
    wheels = options.folder / "wheels"
    collect(versions, options.python, wheels)
    files = list(wheels.glob("*.whl"))
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{len(files)} wheels, {size:.1f} MB, in {wheels}: {' '.join(sorted(versions))}")


if __name__ == "__main__":
    run(main)
