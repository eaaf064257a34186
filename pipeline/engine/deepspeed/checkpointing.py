"""DeepSpeed's side of a checkpoint: its files as a snapshot in memory, and their form for any world size."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tqdm import tqdm

from pipeline.base.errors import UserError
from pipeline.base.files import sync_tree
from pipeline.engine.deepspeed.private import save_through, without_foreign_code
from pipeline.engine.protocol import FileLayout
from pipeline.engine.snapshot import HostCopy
from pipeline.engine.tensor_files import read_tensors
from pipeline.engine.weights import StoredWeight, StoredWeights
from pipeline.ranks import Ranks

TAG = "model"
KEYS = {"optim_states": ("optimizer_state_dict",), "model_states": ("module",)}  # by the end of the name
_POLL = 1.0  # seconds
_WORKERS = 4  # processes of a conversion


class SnapshotWriter(TorchCheckpointEngine):
    """Replaces DeepSpeed's file writer: keeps copies in host memory instead of writing."""

    def __init__(self, engine: Any) -> None:
        """Become the checkpoint engine of a DeepSpeed engine."""
        super().__init__()
        self.host_copy = HostCopy()
        self.states: dict[str, Any] = {}
        save_through(engine, self)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: folders are made when the files are written."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Copy instead of writing; DeepSpeed calls this."""
        self.keep(f"{TAG}/{os.path.basename(path)}", state_dict)

    def keep(self, name: str, state: Any) -> None:
        """Copy a state that becomes the file `name`."""
        self.states[name] = self.host_copy(name, state)

    def take(self) -> dict[str, Any]:
        """Return the states saved since the last call, by file name."""
        states, self.states = self.states, {}
        return states


def check_complete(folder: Path, layout: FileLayout) -> None:
    """Raise a `UserError` unless a snapshot holds the files of all ranks that wrote it."""
    per_rank = {"optim": layout.world_size, "model": layout.world_size if layout.sharding == "zero3" else 1}
    for kind, count in per_rank.items():
        found = len(list((folder / TAG).glob(f"*_{kind}_states.pt")))
        if found != count:
            raise UserError(
                f"{folder / TAG} holds {found} files *_{kind}_states.pt, but {layout.world_size} ranks wrote "
                f"{count} under {layout.sharding}: restore them, or use an older checkpoint."
            )


def check_files(folder: Path, ranks: Ranks) -> None:
    """Raise a `UserError` for a file of a snapshot that is damaged or names code; every rank calls this.

    `without_foreign_code` protects DeepSpeed's own reading. This names the file, on all ranks alike. The
    ranks share the files, and map them instead of reading their tensors.
    """
    with ranks.agreeing(), without_foreign_code():
        for path in sorted(folder.rglob("*.pt"))[ranks.rank :: ranks.world_size]:
            keys = next((keys for end, keys in KEYS.items() if path.stem.endswith(end)), ())
            read_tensors(path, keys)


def make_universal(folder: Path, place: Path, ranks: Ranks) -> Path:
    """Convert the files of a sharded snapshot for any layout, once; every rank calls this.

    The first rank converts in a separate process, and the ranks exchange its state every second. A single
    collective that waited for the end would run into its time limit.

    Args:
        folder: the files of a snapshot, in STEP/model.
        place: folder for the result, universal_STEP.
        ranks: the processes that load it.

    Returns:
        A folder that `loading_universal` is for.

    Raises:
        UserError: when the disk is too small, or DeepSpeed fails.
    """
    final = place / f"universal_{folder.parent.name}"
    if ranks.all_gather(final.is_dir())[0]:
        return final
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(_convert, folder, final) if ranks.is_first else None
        while True:
            if work is not None:
                wait([work], timeout=_POLL)
            problem = work.result() if work is not None and work.done() else None
            ended, problem = ranks.all_gather((work is not None and work.done(), problem))[0]
            if problem is not None:
                raise UserError(problem)
            if ended:
                return final


def _convert(folder: Path, final: Path) -> str | None:
    """Convert; return the problem, if any."""
    size = sum(path.stat().st_size for path in (folder / TAG).iterdir())
    free = shutil.disk_usage(final.parent).free
    if free < 3 * size:  # fragments, their merged form, and this snapshot's small files again
        return (
            f"{folder.parent} was written by another number of ranks or ZeRO stage, and converting it needs "
            f"{tqdm.format_sizeof(3 * size, 'B')}, but {final.parent} has {tqdm.format_sizeof(free, 'B')} "
            "free: make room, or start as many ranks as wrote it, with that stage."
        )
    print(f"converting {folder.parent} for another number of ranks or ZeRO stage", flush=True)
    writing = final.with_name(f".writing_{final.name}")
    shutil.rmtree(writing, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.engine.deepspeed.conversion", "--inject_missing_state"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(writing / TAG)]
    command += ["--num_extract_workers", str(_WORKERS), "--num_merge_workers", str(_WORKERS)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # A new session: a signal that stops the ranks would end the conversion, and look like its failure.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    if done.returncode != 0:
        shutil.rmtree(writing, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return (
            f"{folder.parent} cannot be converted for another number of ranks or ZeRO stage ({last}): start "
            "as many ranks as wrote it, with that stage."
        )
    sync_tree(writing)
    writing.rename(final)
    return None


def open_sharded_weights(folder: Path) -> StoredWeights:
    """Return the fp32 weights of a `DeepSpeedEngine`'s snapshot, joined from their shards when they are read.

    Under ZeRO-3 only that weight comes into memory. ZeRO-1 and 2 cut through parameters: DeepSpeed joins all.
    """
    check_files(folder / TAG, Ranks())
    silent = io.StringIO()
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), without_foreign_code():
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, lazy_mode=True)
    return {
        name.removeprefix("module."): StoredWeight(tuple(value.shape), value.dtype, value.contiguous)
        for name, value in state.items()
    }
