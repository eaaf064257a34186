"""DeepSpeed's ds_to_universal as a program that runs no code from the files that it reads.

It has the options of ``deepspeed.checkpoint.ds_to_universal``, and its result can be loaded under ZeRO-1, 2
and 3. DeepSpeed's own can be loaded only under 1 and 2, or only under 3, as the files were written:

- the states of a weight are flat tensors under 3, and shaped ones by a key under 1 and 2;
- the step counter is in ``optimizer_state.pt`` under 3, and beside each weight under 1 and 2;
- the names of the files with the metadata of a rank differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, PARAM_GROUPS, PARAM_SHAPES

from pipeline.engine.deepspeed.private import (
    STEP_FILE,
    adding_second_moments,
    converting_for_every_stage,
    without_foreign_code,
)
from pipeline.engine.tensor_files import read_tensors

METADATA = "*model_states.pt"
METADATA_NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
# Of the optimizer as a whole. The rest are the states of one rank, and settings, which the run brings.
GLOBAL_STATE = ("loss_scaler", "dynamic_loss_scale", "overflow")


def shapes_of_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights by name, from the files of any stage."""
    groups = read_tensors(next(iter(sorted(folder.glob(METADATA)))), (PARAM_SHAPES,))[PARAM_SHAPES]
    each = groups if isinstance(groups, list) else [groups]
    return {name: tuple(shape) for group in each for name, shape in group.items()}


def complete(folder: Path) -> None:
    """Give a universal checkpoint what the stage that did not write its files needs as well."""
    zero = folder / "zero"
    path = zero / "optimizer_state.pt"
    state: dict[str, Any] = read_tensors(path, (PARAM_GROUPS,), mmap=False)
    if OPTIMIZER_STATE_DICT in state:  # ZeRO-3 wrote it
        step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"]
        for weight in zero.iterdir():
            if weight.is_dir():
                torch.save(step, weight / STEP_FILE)
    else:
        step = read_tensors(next(zero.glob(f"*/{STEP_FILE}")))
    metadata = read_tensors(next(folder.glob(METADATA)), (DS_VERSION,), mmap=False)
    groups = state[PARAM_GROUPS]
    of_stage_3 = {OPTIMIZER_STATE_DICT: {"state": {0: {"step": step}}, PARAM_GROUPS: groups}}
    common = {key: state[key] for key in GLOBAL_STATE if key in state}
    common |= {PARAM_GROUPS: groups, DS_VERSION: metadata[DS_VERSION]}
    torch.save(common | of_stage_3, path)
    for old in folder.glob(METADATA):
        old.unlink()
    for name in METADATA_NAMES:
        torch.save(metadata | {"module": {}}, folder / name)  # the weights are in zero/


def main() -> None:
    """Convert as the command line says."""
    arguments = ds_to_universal.parse_arguments()
    with without_foreign_code():  # its worker processes are forked, so they inherit all three
        shapes = shapes_of_weights(Path(arguments.input_folder))
        with adding_second_moments(), converting_for_every_stage(shapes):
            ds_to_universal.main(arguments)
        complete(Path(arguments.output_folder))


if __name__ == "__main__":
    main()
