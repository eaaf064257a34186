"""Replace the assumptions of a plan by what `python -m benchmarks.gpu_proof` measured on a card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.errors import UserError
from pipeline.planning.assumptions import UPDATE_BYTES, host_milliseconds
from pipeline.planning.gpus import GIB, GPUS, Gpu, gpu_of_device

SCHEMA = 1  # of proof.json
BUSY = 0.9  # share of a step in which a device runs kernels; below, the host is what takes the time


@dataclass(frozen=True)
class Measured:
    """A measured value, and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Proof:
    """What one proof measured.

    Attributes:
        path: its file.
        card: torch's name of the GPU.
        gpu: the GPU of that name.
        figures: of each part that has any, by name.
        trainings: the figures of the trainings on one GPU, by name.
    """

    path: Path
    card: str
    gpu: Gpu
    figures: Mapping[str, Mapping[str, Any]]
    trainings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Proof:
        """Read proof.json.

        Raises:
            UserError: for another kind of file, another version, a dry run, or a card that is not known.
        """
        try:
            content = json.loads(path.read_bytes())
            schema, parts, card = content["schema"], content["parts"], content["machine"]["device"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--calibrate {path} is no proof of a GPU: give the proof.json of benchmarks/gpu_proof."
            ) from error
        if schema != SCHEMA:
            raise UserError(f"--calibrate {path} has format {schema}, this reads {SCHEMA}: measure again.")
        if content["dry_run"]:
            raise UserError(f"--calibrate {path} is of a dry run: measure on a GPU, without --dry-run.")
        gpu = gpu_of_device(card)
        if gpu is None:
            known = ", ".join(GPUS)
            raise UserError(f"--calibrate {path} is of {card}, whose data sheet is missing. Known: {known}.")
        figures = {name: part["figures"] for name, part in parts.items() if part["figures"]}
        alone = {
            name: figures[name]
            for name, part in parts.items()
            if name in figures and part["kind"] == "training" and figures[name]["ranks"] == 1
        }
        return cls(path, card, gpu, figures, alone)

    def nearest(self, parameters: int, stage: int, compiled: bool) -> str | None:
        """Return the training of the most similar size, if possible of this kind; None without any."""

        def distance(name: str) -> tuple[float, bool, bool, bool]:
            run = self.trainings[name]
            size = abs(math.log(run["parameters"] / parameters))
            other = run["zero"]["stage"] != stage, run.get("compiled", False) != compiled
            return round(size, 6), *other, run["objective"] != "puma"

        return min(self.trainings, key=distance, default=None)


def measured(proof: Proof, parameters: int, stage: int, compiled: bool) -> dict[str, Measured]:
    """Return the measured values of `Assumptions`, by name.

    With the efficiency and the share of an update, the plan of the nearest training takes as long as that
    training took. Several ranks wait for each other, so their trainings tell no efficiency.

    Args:
        proof: what was measured.
        parameters: of the planned run.
        stage: of its ZeRO.
        compiled: whether its blocks are (``engine.compile``).
    """
    gpu, found = proof.gpu, {}
    name = proof.nearest(parameters, stage, compiled)
    if name is not None:
        values, source = _of(proof.trainings[name], gpu), f"{proof.card}, {name}"
        found = {key: Measured(value, source) for key, value in values.items()}
    if "ceilings" in proof.figures:
        rate = proof.figures["ceilings"]["host_bytes_per_second"]
        found["host_gigabytes_per_second"] = Measured(rate / 1e9, f"{proof.card}, ceilings")
    if "links" in proof.figures:
        links = proof.figures["links"]
        share = min(1.0, links["link_bytes_per_second"] / gpu.link)
        found["link_share"] = Measured(share, f"{links['ranks']} x {proof.card}, links")
    return found


def _of(run: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
    """Return what one training on one GPU says of the assumptions."""
    computation = run["step_seconds"] - run["update_seconds"]
    memory, trace = run["memory"], run.get("trace")
    busy = min(1.0, trace["device_seconds"] / run["step_seconds"]) if trace else 1.0
    waits = busy < BUSY  # for the host, whose time does not shrink with the micro-batch
    values = {"efficiency": run["executed_flops"] / computation / (busy if waits else 1.0) / gpu.flops}
    of_block = 1e3 * computation / run["layers"]
    least = host_milliseconds(run["zero"]["stage"], run.get("compiled", False))
    if waits or of_block < least:
        values["host_milliseconds"] = of_block
    if run["zero"]["optimizer"] == "gpu":
        rate = run["parameters"] * UPDATE_BYTES / run["update_seconds"]
        values["update_share"] = rate / gpu.memory_bandwidth
    values["reserved_gib"] = memory["beside_torch"] / GIB
    values["fragmentation"] = max(0, memory["reserved"] - memory["allocated"]) / memory["card"]
    return values


def calibrated(proofs: Sequence[Proof], parameters: int, stage: int, compiled: bool) -> dict[str, Measured]:
    """Return what several proofs of the same GPU measured; the last one counts."""
    found: dict[str, Measured] = {}
    for proof in proofs:
        found |= measured(proof, parameters, stage, compiled)
    return found
