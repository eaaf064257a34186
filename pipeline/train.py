"""The main program: ``python -m pipeline.train --config configs/X.yaml [--section.key value ...]``.

One program for one process, torchrun, the deepspeed launcher and srun. A run that finds checkpoints in its
folder goes on from the newest, so an interrupted run is continued by the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor

from pipeline import config as configuration
from pipeline.base import cli, errors
from pipeline.base.files import replacing
from pipeline.chains.slots import SlotGroup
from pipeline.engine.optimizer import learning_rate
from pipeline.engine.runtime import Engine
from pipeline.ranks import read_launch
from pipeline.resilience.guard import Guard
from pipeline.resilience.signals import StopSignals
from pipeline.training.run import Run


def train_step(
    engine: Engine, groups: Sequence[SlotGroup], rate: float, step: int, guard: Guard | None = None
) -> tuple[Tensor, Tensor]:
    """Run optimizer step `step` (1 is the first) of PUMA or any other objective, at learning rate `rate`.

    Returns:
        This rank's loss [], the mean over its micro-batches, and the global gradient norm [].
    """
    parts = []
    for group in groups:  # one a micro-batch, each with chains of its own
        batch = group.inputs(step)
        output = engine.forward(batch)
        group.advance(batch, output, step)  # the scores of this same forward: no second one
        engine.backward(output.loss)
        parts.append(output.loss.detach())
    losses = torch.stack(parts)
    return losses.mean(), engine.step(rate, guard.watch(engine, losses) if guard else None)


def train(run: Run) -> bool:
    """Train on, with logs, evaluations and checkpoints on the way; say whether the last step is done.

    It is not when a rank was asked to stop; the run is saved then. That holds for the last step too, whose
    evaluations a stop cuts short: they are made up for when the run goes on.

    Raises:
        Failure: when the last step could not be saved: its weights are gone, whatever was trained.
    """
    config = run.config
    if run.manifest.step:  # a stop may have cut short what was due
        if run.manifest.held_out_loss is None:
            run.evaluate()
        run.measure_tasks()
    while run.manifest.step < config.train.steps and not run.guard.stop:
        step = run.manifest.step + 1
        run.watchdog.enter("step")
        if step == config.objective.switch_step:
            run.guard.forget()  # another objective has another loss
        if run.example_log is not None:
            run.example_log.write(step, run.groups_of(step))
        rate = learning_rate(step, config.train.steps, config.optimizer.learning_rate, config.schedule)
        loss, norm = train_step(run.engine, run.groups_of(step), rate, step, run.guard)
        run.watchdog.enter("bookkeeping")
        run.advance_manifest(step)
        run.recorder.collect(step, loss, norm, rate)
        if run.guard.problem is not None and run.refuse(step, run.guard.problem):
            continue
        run.progress.advance(step)
        if step % config.train.log_interval == 0 or step == config.train.steps:
            run.log()
        run.evaluate()
        run.measure_tasks()
        if run.due(config.checkpoint.interval, step) or run.guard.stop:
            run.save()
    run.watchdog.enter("save")
    run.saver.wait()
    done = run.manifest.step == config.train.steps and not run.guard.stop
    if done and run.saver.problem is not None:
        raise errors.Failure(
            f"the last step, {config.train.steps}, is trained but not saved: {run.saver.problem} Put it "
            "right, and start the same command again: it goes on from the newest checkpoint."
        )
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code."""
    config = configuration.load(sys.argv[1:] if arguments is None else arguments)
    launch = read_launch(config)
    with ExitStack() as stack:
        signals = stack.enter_context(closing(StopSignals()))
        run = Run(config, launch, signals, stack)
        if launch.rank == 0:
            with replacing(run.folder / "config.yaml") as file:
                file.write(configuration.to_yaml(config).encode())
        if not train(run):
            run.progress.say(f"{run.outcome()}: the same command goes on")
            signals.ignore()
            return errors.EXIT_REQUEUE
        run.progress.say(f"done: {config.train.steps} steps, checkpoints in {run.folder / 'checkpoints'}")
        return errors.EXIT_DONE


if __name__ == "__main__":
    cli.run(main, of_ranks=True)
