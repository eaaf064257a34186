"""What single choices inside a training step cost: each option beside the default, in turns, in one process.

    python -m benchmarks.step_options --shape small --output benchmarks/results/step_options_small_cpu.json

Forward and backward of one micro-batch, half of the positions masked; "head" and "attention" are those parts
alone. Clocks and memory are those of benchmarks/train_step.py. What ZeRO-3 takes: benchmarks/zero_options.py.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.figures import add_output, machine, seconds, write_figures
from benchmarks.random_text import MASK, RandomText
from benchmarks.train_step import SHAPES, Shape, peak_of
from pipeline import objectives
from pipeline.base import cli
from pipeline.chains.slots import SlotGroup, Slots, moved
from pipeline.chains.stream import SlotStream
from pipeline.config import Config, EngineConfig, ObjectiveConfig, Recompute
from pipeline.engine.module import compile_parts
from pipeline.engine.optimizer import adamw_kernel
from pipeline.model import masked_head
from pipeline.model.batch import HeadOutput, Visibility, masked_batch
from pipeline.model.masked_head import HeadOptions
from pipeline.model.sequence import WHOLE
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.model.visibility import attention_mask, block_mask, sees

CHUNKS = (64, 256, 1024, 4096)
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Option:
    """A way to compute something.

    Attributes:
        run: does so, backward included, and leaves no gradient behind.
        peak: returns the most bytes that it holds at once.
    """

    run: Callable[[], Any]
    peak: Callable[[], int] | None = None


class Work:
    """A model and a micro-batch, in the precision that the device has."""

    def __init__(self, shape: Shape, batch_size: int, device: torch.device) -> None:
        """Make them; bf16 weights on a GPU, as DeepSpeed has them."""
        torch.manual_seed(0)
        self.shape, self.batch_size, self.device = shape, batch_size, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = self.new_model(EngineConfig.activation_checkpointing)
        tokens = torch.randint(MASK + 1, shape.vocabulary, (batch_size, shape.length))
        masked = torch.rand(batch_size, shape.length).argsort(dim=1) < shape.length // 2
        tokens, masked = tokens.to(device), masked.to(device)
        self.batch = masked_batch(tokens, masked, batch_size * (shape.length // 2), MASK)

    def new_model(self, recompute: Recompute) -> MaskedDiffusionModel:
        """Return the network with gradients, which are there before a step."""
        with self.device:
            model = MaskedDiffusionModel(self.shape.model(), self.shape.tokens(), recompute).to(self.dtype)
        return with_gradients(model)

    def step(self, model: MaskedDiffusionModel, visibility: Visibility = Visibility()) -> Option:  # noqa: B008
        """Return forward and backward of all."""
        batch = self.batch._replace(visibility=visibility)
        return Option(
            lambda: model(batch).loss.backward(), lambda: peak_of(lambda: model(batch).loss, model, batch)
        )

    def head(
        self,
        chunk: int | None = None,
        order: Tensor | None = None,
        options: HeadOptions = HeadOptions(),  # noqa: B008
        fewer: int = 0,
    ) -> Option:
        """Return those of the head.

        Args:
            chunk: rows of a chunk.
            order: [R], permutes the rows.
            options: of the head.
            fewer: rows to leave out, so that their number is odd.
        """
        rows, hidden_size = len(self.batch.rows) - fewer, self.shape.hidden_size
        hidden = torch.randn(rows, hidden_size, device=self.device, dtype=self.dtype, requires_grad=True)
        hidden.grad = torch.zeros_like(hidden)
        batch = self.batch if order is None else self.batch._replace(targets=self.batch.targets[order])

        def loss() -> Tensor:
            self.model.lm_head.options = options
            with chunks_of(chunk):
                return self.model.lm_head(hidden, batch.targets[:rows], batch.weights[:rows]).loss

        return Option(lambda: loss().backward(), lambda: peak_of(loss, self.model.lm_head, batch))

    def attention(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Option:
        """Return those of one layer's attention, over [xt ; x0] of 2 L positions."""
        shape = self.shape
        size = (self.batch_size, shape.heads, 2 * shape.length, shape.hidden_size // shape.heads)
        q, k, v = (
            torch.randn(size, device=self.device, dtype=self.dtype, requires_grad=True) for _ in range(3)
        )
        return Option(lambda: attend(q, k, v).sum().backward())


def with_gradients(model: MaskedDiffusionModel) -> MaskedDiffusionModel:
    """Return the model with gradients of zero, and one for the head's weight, tied or not."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@contextlib.contextmanager
def chunks_of(rows: int | None) -> Iterator[None]:
    """Let the head compute so many rows at a time; None: as many as it does by default."""
    default = masked_head.chunk_rows
    if rows is not None:
        masked_head.chunk_rows = lambda *_: rows
    yield
    masked_head.chunk_rows = default


def head_options(work: Work) -> dict[str, Option]:
    """Return the sizes of a chunk, and rows in the order of their targets."""
    rows, memory = len(work.batch.rows), masked_head.memory_of(work.device)
    default = masked_head.chunk_rows(work.shape.tokens().rows, memory)
    options = {f"chunks of {min(default, rows):,} rows (default)": work.head()}
    options |= {f"chunks of {chunk:,} rows": work.head(chunk) for chunk in CHUNKS if chunk <= rows}
    options["rows sorted by target"] = work.head(order=work.batch.targets.argsort())
    if work.device.type == "cuda":
        options["without Triton's kernels"] = work.head(options=HeadOptions(fused=False))
    options["1 row fewer"] = work.head(fewer=1)
    return options | {"1 row fewer, padded to 128": work.head(options=HeadOptions(row_multiple=128), fewer=1)}


def checkpointing_options(work: Work) -> dict[str, Option]:
    """Return what is computed again in the backward."""
    options = {"swiglu (default)": work.step(work.model)}
    return options | {kind: work.step(work.new_model(kind)) for kind in ("none", "blocks")}


def compile_options(work: Work) -> dict[str, Option]:
    """Return blocks as they are and compiled (engine.compile); the first turn compiles."""
    model = work.new_model(EngineConfig.activation_checkpointing)
    for block in model.model.layers:
        block.compile()
    compiled = Option(work.step(model).run)  # compiled blocks do not show what they hold
    return {"not compiled (default)": work.step(work.model), "blocks compiled": compiled}


def functions_options(work: Work) -> dict[str, Option]:
    """Return what holds no weights as it is and compiled (engine.compile_functions): model, then chains."""
    model = work.new_model(EngineConfig.activation_checkpointing)
    config = Config("unused", engine=EngineConfig(kind="plain", compile_functions=True))
    compile_parts(config, model, work.device)
    return {
        "not compiled (default)": work.step(work.model),
        "functions compiled": Option(work.step(model).run),
    }


def chains_options(work: Work) -> dict[str, Option]:
    """Return a step of PUMA's chains and their statistics, as they are and compiled."""

    def move(compiled: bool) -> Option:
        size, settings = work.batch_size, Config("unused", objective=ObjectiveConfig(stages=12))
        stream = SlotStream(RandomText(work.shape.vocabulary, work.shape.length), size, 0, workers=1)
        objective = objectives.build(settings, MASK, False)
        group = SlotGroup(range(size), stream, objective, work.device, compiled=compiled)
        batch = group.inputs(1)
        scores = torch.rand(len(batch.rows), device=work.device)
        output = HeadOutput(scores.sum(), -scores.log(), scores)
        slots_now = Slots(group.chains, group.state, group.age, group.following, group.numbers)
        move = torch.compile(moved) if compiled else moved
        now = group.objectives.at(1)
        given = now, now, group.statistics, slots_now, batch.rows, batch.weights, output
        return Option(lambda: move(*given, 1, 2))

    return {"not compiled (default)": move(False), "chains compiled": move(True)}


def documents_options(work: Work) -> dict[str, Option]:
    """Return rows seen whole, and of 4 documents on average that are kept apart (data.isolate_documents)."""
    ends = torch.rand(work.batch_size, work.shape.length, device=work.device) < 4 / work.shape.length
    apart = Visibility(documents=ends.cumsum(dim=1, dtype=torch.int32))
    return {
        "together (default)": work.step(work.model),
        "documents kept apart": work.step(work.model, apart),
        "their mask alone": Option(lambda: attention_mask(None, apart)),
    }


def mask_options(work: Work) -> dict[str, Option]:
    """Return the two ways to make flex_attention's block mask of block diffusion."""
    length = work.shape.length
    blocks = torch.arange(2 * length, device=work.device).repeat(work.batch_size, 1) % length // BLOCK_SIZE
    noisy = torch.arange(2 * length, device=work.device) < length

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(blocks[batch, query], blocks[batch, key], noisy[query], noisy[key])

    size = (work.batch_size, None, 2 * length, 2 * length)
    return {
        "from the range of each tile (default)": Option(lambda: block_mask(blocks, noisy, None)),
        "torch's create_block_mask": Option(lambda: create_block_mask(rule, *size, device=str(work.device))),
    }


def optimizer_options(work: Work) -> dict[str, Option]:
    """Return an update of fp32 weights by torch's kernels for AdamW."""
    kernels = {"one by one": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    default = "fused" if adamw_kernel(work.device) else "one by one"
    options = {}
    for name in sorted(kernels, key=lambda name: name != default):
        model = work.new_model("none").float()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW(model.parameters(), **kernels[name])
        options[name + " (default)" * (name == default)] = Option(optimizer.step)
    return options


def precision_options(work: Work) -> dict[str, Option]:
    """Return fp32 and bf16 weights."""
    names = {torch.float32: "fp32 weights", torch.bfloat16: "bf16 weights"}
    other = torch.float32 if work.dtype == torch.bfloat16 else torch.bfloat16
    model = with_gradients(work.new_model(EngineConfig.activation_checkpointing).to(other))
    return {f"{names[work.dtype]} (default)": work.step(work.model), names[other]: work.step(model)}


def attention_options(work: Work) -> dict[str, Option]:
    """Return the kernels, with all positions seen and under the mask of block diffusion."""
    length = work.shape.length
    blocks = torch.arange(2 * length, device=work.device)[None] % length // BLOCK_SIZE  # [1, 2 L]
    noisy = torch.arange(2 * length, device=work.device) < length  # [2 L]
    dense = sees(blocks[:, :, None], blocks[:, None, :], noisy[:, None], noisy)[:, None]  # [1, 1, 2 L, 2 L]
    sparse = block_mask(blocks, noisy, None)

    def kernel(backend: SDPBackend, mask: Tensor | None) -> Option:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return work.attention(attend)

    masked = "dense mask" if work.device.type == "cpu" else "flex_attention, compiled"
    ours = dense if work.device.type == "cpu" else sparse
    options = {
        "all seen (default)": work.attention(lambda q, k, v: WHOLE.attend(q, k, v, None)),
        f"block mask, {masked} (default)": work.attention(lambda q, k, v: WHOLE.attend(q, k, v, ours)),
        "block mask, flex_attention, not compiled": work.attention(
            lambda q, k, v: flex_attention(q, k, v, block_mask=sparse)
        ),
    }
    for name in ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
        backend = SDPBackend.__members__[name]
        for seen, mask in (("all seen", None), ("block mask", dense)):
            options[f"{seen}, sdpa {name.lower()}"] = kernel(backend, mask)
    return options


GROUPS = {
    "head": head_options,
    "checkpointing": checkpointing_options,
    "compile": compile_options,
    "functions": functions_options,
    "chains": chains_options,
    "documents": documents_options,
    "masks": mask_options,
    "optimizer": optimizer_options,
    "precision": precision_options,
    "attention": attention_options,
}


def measure(options: dict[str, Option], work: Work, repetitions: int, wall_clock: bool) -> dict[str, Any]:
    """Return median seconds, ratios to the first option of the same turn, and bytes.

    The first turn is not counted, and an option that the device does not have is left out.
    """
    left = {}
    for name, option in options.items():
        try:
            option.run()
        except RuntimeError as error:
            print(f"  {name:44} not here: {str(error).split('.')[0]}")
        else:
            left[name] = option
    turns = [
        {name: seconds(option.run, work.device, wall_clock) for name, option in left.items()}
        for _ in range(repetitions)
    ]
    first = next(iter(left))
    results = {}
    for name, option in left.items():
        ratio = statistics.median(turn[name] / turn[first] for turn in turns)
        results[name] = {"seconds": statistics.median(turn[name] for turn in turns), "ratio": ratio}
        if option.peak is not None:
            results[name]["peak_bytes"] = option.peak()
        peak = f"{results[name]['peak_bytes'] / 1e6:10,.0f} MB" if option.peak is not None else ""
        print(f"  {name:44} {results[name]['seconds']:9.4f} s {ratio:7.3f} {peak}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line names, print a table and write the figures."""
    parser = cli.ToolParser(description="What single choices inside a training step cost, in turns.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="network and sequences")
    parser.add_argument("--length", type=int, help="tokens of a sequence (default: those of the shape)")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of the micro-batch")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of the options")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="groups")
    parser.add_argument(
        "--wall-clock",
        action="store_true",
        help="on an idle CPU: time by the clock, on all cores",
    )
    add_output(parser)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.wall_clock:
        torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    if options.length is not None:
        shape = replace(shape, length=options.length)
    work = Work(shape, options.batch_size, device)
    results = {"shape": asdict(shape), "batch_size": options.batch_size, "machine": machine(device)}
    for group in options.only:
        print(group)
        results[group] = measure(GROUPS[group](work), work, options.repetitions, options.wall_clock)
        write_figures(options.output, results)  # whatever ends this program leaves the groups before


if __name__ == "__main__":
    cli.run(main)
