"""The main program: ``python -m pipeline.train --config configs/X.yaml [--section.key value ...]``.

One program for one process, torchrun, the deepspeed launcher and srun. A run that finds checkpoints in its
folder resumes from the newest, so the same command continues an interrupted run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config as configuration
from pipeline.base import cli
from pipeline.base.errors import EXIT_DONE, EXIT_REQUEUE
from pipeline.base.files import replace_text
from pipeline.training.learning_rate import learning_rate

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.chains.slots import SlotGroup
    from pipeline.engine.protocol import Engine
    from pipeline.resilience.guard import Guard
    from pipeline.training.start import Training


def train_step(
    engine: Engine, groups: Sequence[SlotGroup], rate: float, step: int, guard: Guard | None = None
) -> tuple[Tensor, Tensor]:
    """Run optimizer step `step` (1 is the first) of PUMA or any other objective, at learning rate `rate`.

    Returns:
        This rank's loss [], the mean over its micro-batches, and the global gradient norm [].
    """
    import torch  # here and in `main`: it takes seconds, which neither help nor a wrong setting needs

    parts = []
    engine.begin_step(len(groups))
    for group in groups:  # one per micro-batch
        batch = group.inputs(step)  # xt: examples under the masks of their chains
        output = engine.forward(batch)
        group.advance(batch, output, step)  # reveals x0 by the scores of this forward, the only one
        engine.backward(output.loss)
        parts.append(output.loss.detach())
    losses = torch.stack(parts)
    return losses.mean(), engine.step(rate, guard.watch(engine.ranks, losses) if guard else None)


def train(run: Training) -> bool:
    """Train to the last step, or until a rank is asked to stop; return whether the last step is done.

    The run is saved in either case.

    Raises:
        Failure: when the last step could not be saved.
    """
    config, state = run.config, run.state
    for evaluation in run.evaluations:  # those that a stop cut short after the last save
        evaluation.after_step()
    while not (state.is_done or run.stop.agreed):
        step = state.step + 1
        run.watchdog.enter("step")
        if config.changes_at(step):
            run.guard.forget()  # its window is of another objective's or data mix's losses
        if step in config.train.batches:
            run.log.flush()  # rates are of steps with one batch
        groups = run.groups.of_step(step)
        run.log.begin_step(groups)
        peak = config.peak_rate(step)
        rate = learning_rate(step, config.train.steps, peak, config.schedule, state.branched_at)
        loss, gradient_norm = train_step(run.engine, groups, rate, step, run.guard)
        run.watchdog.enter("bookkeeping")
        state.advance(config.train.batch_at(step) * config.data.sequence_length)
        run.log.collect(loss, gradient_norm, rate)
        if run.recovery.rolled_back(groups):
            continue
        for component in (run.log, *run.evaluations, run.checkpoints, run.tracer):
            component.after_step()
    run.checkpoints.finish()
    return state.is_done and not run.stop.agreed


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    config = configuration.load(sys.argv[1:] if arguments is None else arguments)
    from pipeline.ranks import join_ranks, naming_lost_ranks
    from pipeline.resilience.signals import StopSignals
    from pipeline.training.start import start
    from pipeline.training.tracing import memory_snapshots

    ranks = join_ranks(config.engine.device, config.engine.sequence_parallel_size)
    with naming_lost_ranks(), ExitStack() as stack:
        signals = stack.enter_context(closing(StopSignals()))
        stack.callback(ranks.disconnect)
        ranks.connect()
        with memory_snapshots(config, ranks):  # within the stack, which closes the engine
            run = start(config, ranks, signals, stack)
            if ranks.is_first:
                replace_text(Path(config.run_dir) / "config.yaml", configuration.to_yaml(config))
            if not train(run):
                run.log.progress.say(f"{run.outcome()}: the same command resumes")
                signals.ignore()
                return EXIT_REQUEUE
            folder = run.checkpoints.saver.folder
            run.log.progress.say(f"done: {config.train.steps} steps, checkpoints in {folder}")
            return EXIT_DONE


if __name__ == "__main__":
    cli.run(main, of_ranks=True)
