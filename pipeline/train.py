"""The main program: ``python -m pipeline.train --config configs/X.yaml [--section.key value ...]``.

One program for one process, torchrun, the deepspeed launcher and srun. A run that finds checkpoints in its
folder goes on from the newest, so an interrupted run is continued by the same command.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from pipeline import checkpoint, cli, objectives
from pipeline import config as configuration
from pipeline.checkpoint import FORMAT, Manifest
from pipeline.config import Config
from pipeline.data.batch import SampleDataset
from pipeline.data.samples import Datasets, build_datasets, check_data
from pipeline.data.streams import SlotStream
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluation.held_out import held_out_loss
from pipeline.files import replacing
from pipeline.model.batch import Vocabulary
from pipeline.monitor.progress import Progress
from pipeline.monitor.recorder import Recorder
from pipeline.monitor.sample_log import SampleLog
from pipeline.optimizer import learning_rate
from pipeline.runtime import Engine, Launch, agree, build_engine, read_launch
from pipeline.slots import SlotGroup, slots_of_rank


def train_step(
    engine: Engine, groups: Sequence[SlotGroup], rate: float, step: int
) -> tuple[Tensor, Tensor | float]:
    """Run optimizer step `step` (1 is the first) of PUMA or any other objective, at learning rate `rate`.

    Returns:
        This rank's loss [], the mean over its micro-batches, and the global gradient norm.
    """
    losses = []
    for group in groups:  # one a micro-batch, each with chains of its own
        batch = group.inputs(step)
        output = engine.forward(batch)
        group.advance(batch, output, step)  # the scores of this same forward: no second one
        engine.backward(output.loss)
        losses.append(output.loss.detach())
    return torch.stack(losses).mean(), engine.step(rate)


class Run:
    """A run with everything that it holds open."""

    def __init__(self, config: Config, launch: Launch, stack: ExitStack) -> None:
        """Build data, engine and chains, and go on from the newest checkpoint where there is one."""
        config = fit_micro_batch(config, launch)
        self.config = config
        self.folder = Path(config.run_dir)
        tokenizer = Tokenizer.load(Path(config.data.tokenizer))
        check_data(config.data, tokenizer)
        accumulation = config.train.accumulation(launch.data_size)
        vocabulary = read_vocabulary(config, tokenizer)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.engine = build_engine(config, launch, vocabulary)
        stack.callback(self.engine.close)
        self.take_folder(stack)
        cache = Path(config.data.cache) if config.data.cache else self.folder / "dataset_cache"
        self.data = build_datasets(config.data, tokenizer, config.train.seed, cache)
        check_validation(config, self.data)
        stream = SlotStream(
            self.data.train, config.train.global_batch_size, config.train.seed, config.data.workers
        )
        stack.callback(stream.close)
        self.objectives = objectives.build(config, tokenizer.mask, self.data.has_padding)
        slots = slots_of_rank(launch.data_rank, launch.data_size, accumulation, config.train.micro_batch_size)
        self.groups = [SlotGroup(part, stream, self.objectives, launch.device) for part in slots]
        self.manifest = Manifest(
            FORMAT, 0, 0, launch.world_size, self.engine.layout, config.train.global_batch_size,
            vocabulary._asdict(), self.data.fingerprint,
        )  # fmt: skip
        self.resume()
        total, done = config.train.steps, self.manifest.step
        self.progress = Progress(total, done, "step", enabled=launch.rank == 0)
        stack.callback(self.progress.close)
        self.recorder = Recorder(self.folder, self.engine, self.groups, done + 1)
        stack.callback(self.recorder.close)
        self.sample_log: SampleLog | None = None
        if config.train.log_samples:
            self.sample_log = SampleLog(self.folder, self.engine, self.groups, stream, done + 1)
            stack.callback(self.sample_log.close)
        self.saver = checkpoint.Saver(config, self.engine, self.groups, self.progress.say)
        stack.callback(self.saver.close)

    def take_folder(self, stack: ExitStack) -> None:
        """Make sure that no other run works on the folder, and clear up after one that was killed."""
        problem = None
        if self.engine.launch.rank == 0:
            try:
                stack.callback(checkpoint.RunLock(self.folder).release)
                checkpoint.clear(self.folder)
            except cli.UserError as error:
                problem = str(error)
        agree(self.engine, problem)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        found = checkpoint.newest(self.folder, self.engine, self.config.checkpoint.verify_hashes)
        if found is None:
            return
        folder, saved = found
        checkpoint.check_continues(folder, saved, self.manifest, self.config)
        checkpoint.load(folder, saved, self.engine, self.groups)
        self.manifest.step = saved.step
        if self.engine.launch.rank == 0:
            ranks = (
                ""
                if saved.world_size == self.manifest.world_size
                else f", written by {saved.world_size} ranks"
            )
            print(f"resumed from {folder} (step {saved.step}{ranks})", flush=True)

    def train(self) -> None:
        """Train to the last step, with logs, evaluations and checkpoints on the way."""
        train = self.config.train
        for step in range(self.manifest.step + 1, train.steps + 1):
            if self.sample_log is not None:
                self.sample_log.write(step)
            rate = learning_rate(step, train.steps, self.config.optimizer.learning_rate, self.config.schedule)
            loss, norm = train_step(self.engine, self.groups, rate, step)
            self.advance_manifest(step)
            self.recorder.collect(step, loss, norm, rate)
            self.progress.advance(step)
            last = step == train.steps
            if last or step % train.log_interval == 0:
                self.log()
            if self.data.valid is not None and self.due(self.config.evaluation.interval, step):
                self.evaluate(self.data.valid)
            if last or step % self.config.checkpoint.interval == 0:
                self.save()
        self.saver.wait()

    def advance_manifest(self, step: int) -> None:
        """Bring the facts of the next checkpoint up to a step that was just trained."""
        self.manifest.step = step
        self.manifest.tokens = step * self.config.train.global_batch_size * self.config.data.sequence_length
        self.manifest.held_out_loss = None

    def due(self, interval: int, step: int) -> bool:
        """Say whether something done every `interval` steps (0: never), and at the last one, is due."""
        return interval > 0 and (step == self.config.train.steps or step % interval == 0)

    def log(self) -> None:
        """Fetch, write and show the figures of the steps since the last time."""
        samples = self.config.train.global_batch_size
        values = self.recorder.flush(samples, samples * self.config.data.sequence_length)
        self.progress.report(
            f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"masked {values['masked_fraction']:.2f}  {values['tokens_per_second']:,.0f} tokens/s"
        )

    def evaluate(self, valid: SampleDataset) -> None:
        """Measure and write the held-out loss, of the averaged weights too where they are kept."""
        losses = {"held_out/loss": self.held_out_loss(valid)}
        if self.config.optimizer.ema_decay is not None:
            with self.engine.averaged_weights():
                losses["held_out/ema_loss"] = self.held_out_loss(valid)
        self.manifest.held_out_loss = losses.get("held_out/ema_loss", losses["held_out/loss"])
        self.recorder.write(self.manifest.step, losses)
        facts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.progress.say(f"step {self.manifest.step}: {facts} nats a masked token")
        self.recorder.restart_clock()

    def held_out_loss(self, valid: SampleDataset) -> float:
        """Return the loss on the validation samples with the weights as they are."""
        samples, batch_size = self.config.evaluation.samples, self.config.train.micro_batch_size
        objective = self.objectives.at(self.manifest.step).held_out()
        return held_out_loss(self.engine, valid, samples, batch_size, objective, self.manifest.step)

    def save(self) -> None:
        """Save the run, with all figures up to this step in their files first."""
        if self.recorder.pending:
            self.log()
        self.recorder.sync()
        self.saver.save(self.manifest)
        self.recorder.restart_clock()


def fit_micro_batch(config: Config, launch: Launch) -> Config:
    """Return the configuration with a micro-batch that fits the number of ranks; say so if it is smaller."""
    wanted, train = config.train, config.train.fitted(launch.data_size, launch.sequence_size)
    if launch.rank == 0 and train.micro_batch_size != wanted.micro_batch_size:
        print(
            f"train.micro_batch_size is {train.micro_batch_size} instead of {wanted.micro_batch_size}: it "
            f"must divide the {wanted.global_batch_size // launch.data_size} sequences of a rank and step",
            flush=True,
        )
    return dataclasses.replace(config, train=train)


def read_vocabulary(config: Config, tokenizer: Tokenizer) -> Vocabulary:
    """Return the model's vocabulary; raise a `UserError` where the data has more tokens than the model."""
    tokens = tokenizer.vocab_size
    rows = config.model.vocab_size or -(-tokens // 8) * 8
    if rows < tokens:
        raise cli.UserError(
            f"model.vocab_size is {rows}, but {config.data.tokenizer} has {tokens} tokens: raise it to "
            f"{tokens} or more, or leave it out."
        )
    return Vocabulary(rows, tokens, tokenizer.mask)


def check_validation(config: Config, data: Datasets) -> None:
    """Raise a `UserError` when evaluation is asked for and there is nothing to evaluate on."""
    if config.evaluation.interval and data.valid is None:
        raise cli.UserError(
            f"data.split = {config.data.split!r} gives no validation sample: give validation a larger share, "
            "or set evaluation.interval to 0."
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    config = configuration.load(sys.argv[1:] if arguments is None else arguments)
    launch = read_launch(config)
    with ExitStack() as stack:
        run = Run(config, launch, stack)
        if launch.rank == 0:
            with replacing(run.folder / "config.yaml") as file:
                file.write(configuration.to_yaml(config).encode())
        run.train()
        run.progress.say(f"done: {config.train.steps} steps, checkpoints in {run.folder / 'checkpoints'}")


if __name__ == "__main__":
    cli.run(main)
