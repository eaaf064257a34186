"""The main program with a fault in it, started by the tests: faulty.py FAULTS [--section.key value ...]

FAULTS is JSON, {"kind": {"rank": 1, "steps": [5]}, ...}:
    nan         the loss of every micro-batch is NaN
    loss_spike  the loss is 1,000 times as high
    norm_spike  the gradients are a million times as high, the loss is not
    example      the loss is NaN wherever this example of the training split is ({"sample": 3})
    hang        the rank does not come back from its data
    signal      the rank alone gets SIGTERM
Where the guard refuses an update, the program itself checks that nothing has changed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch

from pipeline import train
from pipeline.base import cli
from pipeline.chains.slots import SlotGroup
from pipeline.engine.deepspeed import DeepSpeedEngine

RANK = int(os.environ.get("RANK", "0"))
now = {"step": 0}
learning_rate, run_step = train.learning_rate, train.train_step
forward, backward, inputs = DeepSpeedEngine.forward, DeepSpeedEngine.backward, SlotGroup.inputs
faults: dict[str, dict[str, Any]] = {}


def strikes(kind: str) -> bool:
    """Say whether a fault is due on this rank at this step."""
    fault = faults.get(kind, {})
    return fault.get("rank") == RANK and now["step"] in fault["steps"]


def noting_step(step: int, *rest: Any) -> float:
    now["step"] = step
    return learning_rate(step, *rest)


def faulty_inputs(group: SlotGroup, step: int) -> Any:
    if strikes("hang"):
        time.sleep(1000)
    if strikes("signal"):
        os.kill(os.getpid(), signal.SIGTERM)
    batch = inputs(group, step)
    examples = [group.stream.index(position) for position in group.examples.ids.tolist()]
    now["poisoned"] = faults.get("sample", {}).get("sample") in examples
    return batch


def faulty_forward(engine: DeepSpeedEngine, batch: Any) -> Any:
    output = forward(engine, batch)
    factor = float("nan") if strikes("nan") or now["poisoned"] else 1000.0 if strikes("loss_spike") else 1.0
    return output._replace(loss=output.loss * factor)


def faulty_backward(engine: DeepSpeedEngine, loss: torch.Tensor) -> None:
    backward(engine, loss * (1e6 if strikes("norm_spike") else 1.0))


def state_of(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """Return copies of this rank's weights in both precisions, moments, step counts and average."""
    zero = engine.engine.optimizer
    moments = [value for state in zero.optimizer.state.values() for value in state.values()]
    working = zero.fp16_partitioned_groups_flat if hasattr(zero, "fp16_groups") else zero.bit16_groups_flat
    everything = [*engine.shards.weights(), *working, *moments]
    assert engine.average is not None
    return [torch.as_tensor(value).detach().clone() for value in [*everything, *engine.average.average]]


def checked_step(engine: DeepSpeedEngine, groups: Any, rate: float, *rest: Any) -> Any:
    before = state_of(engine)
    updates = engine.average.updates if engine.average else 0
    result = run_step(engine, groups, rate, *rest)
    guard = next(each for each in rest if hasattr(each, "problem"))
    after = state_of(engine)  # there are no moments before the first update
    same = [torch.equal(old, new) for old, new in zip(before, after, strict=now["step"] > 1)]
    if guard.problem is not None:
        assert all(same), "a refused step must change nothing"
        assert engine.average is not None
        assert engine.average.updates == updates
    else:
        assert not any(same[: len(engine.shards.weights())]), "an accepted step changes the weights"
    return result


if __name__ == "__main__":
    faults = json.loads(sys.argv[1])
    train.learning_rate, train.train_step = noting_step, checked_step
    SlotGroup.inputs, DeepSpeedEngine.forward = faulty_inputs, faulty_forward
    DeepSpeedEngine.backward = faulty_backward
    arguments = sys.argv[2:]
    cli.run(lambda _: train.main(arguments), of_ranks=True)
