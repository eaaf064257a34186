"""How often DeepSpeed makes the host wait for the device, by ZeRO settings; counted on CPU ranks.

usage: python -m benchmarks.host_waits [--ranks 2] [--output FILE.json]

A host that waits launches nothing meanwhile, and the device idles afterwards until new work arrives. On a
CPU, DeepSpeed leaves its waits out. Here its accelerator claims to run behind the host, as a GPU does, with
streams and events that only count, so every wait is at the place where a GPU run has it. Values that the host
reads from the device (`item`, `tolist`) are counted beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.figures import add_output, write_figures
from benchmarks.random_text import config_with, engine_on_random_text
from benchmarks.ranks import on_ranks
from pipeline.base.cli import ToolParser, run

STEPS, MICRO_BATCHES, SEQUENCES, TOKENS = 3, 4, 2, 500
KINDS = ("wait", "read")
SETTINGS = f"""
    --data.sequence_length 32 --engine.device cpu --train.micro_batch_size {SEQUENCES}
    --model.layers 6 --model.hidden_size 64 --model.heads 4
    --model.intermediate_size 192 --schedule.warmup_steps 1 --train.steps {STEPS}
""".split()
BUCKET = 100_000  # a third of the weights: several buckets a micro-batch
CASES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"stage": 2, "overlap_comm": False},
    "ZeRO-2, overlap_comm": {"stage": 2, "overlap_comm": True},
    "ZeRO-3": {"stage": 3, "overlap_comm": False},
    "ZeRO-3, overlap_comm": {"stage": 3, "overlap_comm": True},
    "ZeRO-3, weights of 20,000 stay whole": {"stage": 3, "stage3_param_persistence_threshold": 20_000},
}


class Counted:
    """A stream or an event that does nothing but count its waits."""

    waits: ClassVar[Counter[str]] = Counter()

    def __init__(self, **options: Any) -> None:
        pass

    def synchronize(self) -> None:
        self.waits["wait"] += 1

    def query(self) -> bool:
        return True

    def record(self, *arguments: Any) -> None:
        pass

    wait_stream = wait_event = record


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count a read."""
        Counted.waits["read"] += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextmanager
def behind_the_host() -> Iterator[None]:
    """Let DeepSpeed's CPU accelerator claim to run behind the host."""
    from deepspeed.accelerator import get_accelerator  # after DS_ACCELERATOR is set

    stream = Counted()
    replaced = {
        "resolves_data_dependency": lambda self: False,
        "is_synchronized_device": lambda self: False,
        "handles_memory_backpressure": lambda self: False,
        "synchronize": lambda self, device=None: stream.synchronize(),
        "current_stream": lambda self, device=None: stream,
        "default_stream": lambda self, device=None: stream,
        "stream": lambda self, stream: nullcontext(),
        "Stream": Counted,
        "Event": Counted,
    }
    with (
        mock.patch.multiple(type(get_accelerator()), **replaced),
        mock.patch.object(torch.Tensor, "record_stream"),
    ):
        yield


def measure(name: str, ranks: int) -> dict[str, dict[str, float]]:
    """Train on this rank; return the waits and reads of a micro-batch and of a step."""
    found: dict[str, Counter[str]] = {}
    with ExitStack() as stack:
        settings = {"zero_optimization": {"reduce_bucket_size": BUCKET} | CASES[name]}
        arguments = [*SETTINGS, "--train.global_batch_size", str(SEQUENCES * MICRO_BATCHES * ranks)]
        config = stack.enter_context(config_with(settings, arguments))
        stack.enter_context(behind_the_host())
        engine, groups = stack.enter_context(engine_on_random_text(config, TOKENS))
        with Reads():
            for step in range(STEPS):
                Counted.waits.clear()
                for group in groups:
                    found["micro-batches"] = Counter(Counted.waits)
                    engine.backward(engine.forward(group.inputs(step + 1)).loss)
                found["before the step"] = Counter(Counted.waits)
                engine.step(1e-4)
                found["step"] = Counter(Counted.waits)
    last = found["micro-batches"]  # all but the last micro-batch, which also ends the accumulation
    return {
        "micro-batch": {kind: last[kind] / (MICRO_BATCHES - 1) for kind in KINDS},
        "step": {kind: found["step"][kind] - found["before the step"][kind] for kind in KINDS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Count for every case and print."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--ranks", type=int, default=2, help="world size")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases")
    add_output(parser)
    options = parser.parse_args(arguments)
    results = {}
    print(f"{'waits and reads of':38}{'a micro-batch':>16}{'the step':>16}", flush=True)
    for name in options.only:
        results[name] = counts = on_ranks(options.ranks, measure, name, options.ranks)
        cells = (f"{each['wait']:.1f} + {each['read']:.1f}" for each in counts.values())
        print(f"{name:38}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    write_figures(options.output, {"ranks": options.ranks, "cases": results})


if __name__ == "__main__":
    run(main)
