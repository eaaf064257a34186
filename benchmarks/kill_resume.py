"""Kill a training again and again, and compare its losses with those of a run that was left alone.

usage: python -m benchmarks.kill_resume --kills 100
       python -m benchmarks.kill_resume --kills 10 --curriculum --ranks 2 1 2 --tolerance 1e-3

Every process of the training is killed (SIGKILL) at random moments: some steps after it has come up, while
it comes up, while a checkpoint is being written, during an evaluation. The first kill waits for a checkpoint.
The same command resumes each time, on as many ranks as --ranks has next. At the end every step must have
trained the examples that it has in the undisturbed run, which is on the first of the ranks. Every metric must
equal that run's bit for bit or, on several numbers of ranks, losses and gradient norms up to the tolerance;
the exit code says whether they do. What is done is remembered in the folder: this program can itself be
interrupted.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.trainings import ROOT, end_with_parent, run_tool, sudoku_settings
from pipeline.base.cli import ToolParser, add_overrides, overrides, run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED, UserError
from pipeline.base.files import replace_text, write_json
from pipeline.checkpoint.manifest import checkpoints
from pipeline.monitor.example_log import FOLDER as EXAMPLES
from pipeline.monitor.history import METRICS_FILE
from pipeline.monitor.writers import is_measured

SETTINGS = """
    --model.layers 2 --model.hidden_size 64 --model.intermediate_size 128 --objective.threshold 0.3
    --objective.stages 6 --objective.stages_increment 1 --objective.stages_first_increase 20
    --objective.stages_interval 20 --optimizer.ema_decay 0.99 --train.global_batch_size 16
    --train.micro_batch_size 4
    --train.log_interval 1 --schedule.warmup_steps 10 --data.kind pairs
    --evaluation.interval 5 --evaluation.samples 64 --checkpoint.interval 3
""".split()
# Two mixes of the data, three batches, Muon. The reveals do not ask the model: at another number of ranks,
# scores that nearly tie are ranked differently. Shares of the steps, for --steps.
CURRICULUM = """
    --objective.policy random --objective.threshold null --optimizer.kind muon
    --optimizer.learning_rate 1e-3 --schedule.batch_scaling sqrt
""".split()
MIX_AT, GROW_AT = 0.5, {0.25: 24, 0.7: 48}
LOSSES = ("loss", "gradient_norm", "held_out/loss", "held_out/ema_loss")
AIMS = ("training", "save", "evaluation", "start")
STEP = re.compile(r"step (\d+)/")


@dataclass
class Death:
    """One kill.

    Attributes:
        aim: what it was meant to hit.
        seconds: since the start of the processes.
        step: the last step that was reported; 0 = none since the start.
        checkpoint: the newest checkpoint left behind; 0 = none.
        hit: what the run was found doing.
        ranks: processes of the training.
    """

    aim: str
    seconds: float
    step: int
    checkpoint: int
    hit: str
    ranks: int = 2


class Life:
    """A training from its start to its death or its end."""

    def __init__(self, command: Sequence[str], run_dir: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.run_dir = run_dir
        intervals = [b for a, b in pairwise(command) if a == "--evaluation.interval"]
        self.evaluation_interval = int(intervals[-1])
        self.started = time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            preexec_fn=end_with_parent(),
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def ended(self) -> bool:
        """Say whether the training is over."""
        return self.process.poll() is not None

    def steps(self) -> list[int]:
        """Return the steps that were reported since the start."""
        return [int(found[1]) for line in list(self.lines) if (found := STEP.match(line))]

    def saving(self) -> bool:
        """Say whether a checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob(".writing_*"))

    def evaluating(self) -> bool:
        """Say whether the last line is that of a step with an evaluation, whose result is still to come."""
        steps = [line for line in list(self.lines) if line.startswith("step ")]
        found = STEP.match(steps[-1]) if steps else None
        return found is not None and int(found[1]) % self.evaluation_interval == 0

    def wait_for(self, aim: str, chance: random.Random, start_up: float) -> None:
        """Return at a moment to kill, or when the training has ended; it begins after `start_up` seconds."""
        if aim == "start":
            self._sleep(chance.uniform(0, start_up))
            return
        wanted = chance.randrange(1, 9)
        while len(self.steps()) < wanted and not self.ended():
            time.sleep(0.01)
        while aim == "training" and not checkpoints(self.run_dir) and not self.ended():
            time.sleep(0.01)  # nothing is resumed before the first one
        if aim == "training":
            self._sleep(chance.uniform(0, 0.5))
        doing = {"save": self.saving, "evaluation": self.evaluating}.get(aim, lambda: True)
        while not doing() and not self.ended():
            time.sleep(0.0005)
        if aim != "training":
            self._sleep(chance.uniform(0, 0.05))

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.ended():
            time.sleep(0.001)

    def kill(self, aim: str, ranks: int) -> Death:
        """Kill every process, of so many ranks, without warning, and say what was going on."""
        everyone = [
            *psutil.Process(self.process.pid).children(recursive=True),
            psutil.Process(self.process.pid),
        ]
        for each in everyone:
            each.suspend()  # so that none sees another die
        seconds = time.monotonic() - self.started
        for each in everyone:
            each.kill()
        self.process.wait()
        psutil.wait_procs(everyone)
        self.reader.join()
        steps, left = self.steps(), checkpoints(self.run_dir)
        hit = "start" if not steps else "save" if self.saving() else "training"
        if steps and self.evaluating():
            hit = "evaluation" if hit == "training" else "save and evaluation"
        newest = int(left[-1].name.removeprefix("step_")) if left else 0
        return Death(aim, round(seconds, 2), steps[-1] if steps else 0, newest, hit, ranks)


def training(folder: Path, ranks: int) -> list[str]:
    """Return the command of a training on so many ranks, less its run_dir and steps."""
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    )
    settings = [*sudoku_settings(folder, 4, 8, 500), *SETTINGS, "--train.log_samples", "true"]
    return [sys.executable, *start, "-m", "pipeline.train", *settings]


def curriculum(folder: Path, steps: int) -> list[str]:
    """Return the settings of a curriculum over so many steps; make the puzzles of its second mix, once."""
    corpus, pairs = folder / "harder.jsonl", folder / "harder"
    if not pairs.with_suffix(".idx").exists():
        puzzles = ["--size", "4", "--clues", "6", "--count", "300", "--seed", "3", "--split", "train"]
        run_tool("tools/make_sudoku.py", *puzzles, "--output", str(corpus))
        keys = ["--prompt-key", "prompt", "--answer-key", "answer", "--tokenizer", str(folder / "tokenizer")]
        run_tool("tools/preprocess_data.py", "--input", str(corpus), *keys, "--output-prefix", str(pairs))
    mix = {"first_step": int(MIX_AT * steps), "prefixes": [str(folder / "pairs"), str(pairs)]}
    ramp = [{"first_step": int(at * steps), "global_batch_size": size} for at, size in GROW_AT.items()]
    phases = ["--data.phases", json.dumps([mix | {"weights": [1, 3]}])]
    return [*CURRICULUM, *phases, "--train.batch_ramp", json.dumps(ramp)]


def finish(command: Sequence[str], run_dir: Path) -> list[dict[str, float]]:
    """Let a training run to its end; return its metrics, a line a step or evaluation."""
    life = Life([*command, "--run_dir", str(run_dir)], run_dir)
    if life.process.wait() != EXIT_DONE:
        life.reader.join()
        raise UserError(f"the training in {run_dir} failed: {' '.join(life.lines[-3:])}")
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]


def die(
    command: Sequence[str], run_dir: Path, number: int, seed: int, start_up: float, ranks: int
) -> Death | None:
    """Start the training and kill it; nothing where it came to its end before."""
    chance = random.Random(f"{seed}/{number}")
    aim = AIMS[number % len(AIMS)]
    life = Life([*command, "--run_dir", str(run_dir)], run_dir)
    life.wait_for(aim, chance, start_up)
    if life.ended():
        if life.process.returncode != EXIT_DONE:
            life.reader.join()
            raise UserError(f"the training in {run_dir} failed by itself: {' '.join(life.lines[-3:])}")
        return None
    return life.kill(aim, ranks)


def compare(
    alone: list[dict[str, float]], killed: list[dict[str, float]], tolerance: float
) -> dict[str, object]:
    """Return how many values there are, how many differ by more than the tolerance, and by how much.

    What is measured is left out; with a tolerance, everything but `LOSSES`.
    """
    flat = [
        {
            (line["step"], key): value
            for line in lines
            for key, value in line.items()
            if (key in LOSSES if tolerance else not is_measured(key))
        }
        for lines in (alone, killed)
    ]
    apart = {key: distance(*(side.get(key) for side in flat)) for key in flat[0].keys() | flat[1].keys()}
    differing = [key for key, distance in apart.items() if not distance <= tolerance]
    largest = max((each for each in apart.values() if each == each), default=0.0)
    return {
        "values": len(flat[0]), "differing": len(differing), "first": sorted(differing)[:3],
        "largest_difference": largest,
    }  # fmt: skip


def distance(one: object, other: object) -> float:
    """Return how far two values are apart; NaN for what differs and is no number, such as a missing one."""
    if one == other:
        return 0.0
    are_numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return abs(one - other) if are_numbers else math.nan


def examples(run_dir: Path) -> dict[int, list[list[int]]]:
    """Return the examples of each step, as (epoch, number), over all ranks."""
    steps: dict[int, list[list[int]]] = defaultdict(list)
    for path in (run_dir / EXAMPLES).iterdir():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] += entry["samples"]
    return {step: sorted(each) for step, each in sorted(steps.items())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, print the table and write it."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=100, help="how often the run is killed")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments")
    parser.add_argument(
        "--steps", type=int, default=None, help="steps of the run (default: 20, and 4 a kill)"
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2], help="processes of the training, life after life"
    )
    parser.add_argument(
        "--curriculum", action="store_true", help="two mixes of the data, a growing batch, Muon"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="of losses and gradient norms (default: bit for bit)"
    )
    add_overrides(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/kill_resume"), help="where the runs are")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    options = parser.parse_args(arguments)
    steps = options.steps or 20 + 4 * options.kills
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def command(life: int) -> list[str]:
        of_run = training(folder, options.ranks[life % len(options.ranks)])
        of_run += curriculum(folder, steps) if options.curriculum else []
        of_run += [part for each in overrides(options) for part in each.split("=", 1)]
        return [*of_run, "--train.steps", str(steps)]

    journal = folder / "deaths.json"
    deaths = [Death(**death) for death in json.loads(journal.read_text())] if journal.exists() else []
    alone = finish(command(0), folder / "alone")
    while len(deaths) < options.kills:
        start_up = median([death.seconds for death in deaths if death.step] or [10.0])
        number, ranks = len(deaths), options.ranks[len(deaths) % len(options.ranks)]
        death = die(command(number), folder / "killed", number, options.seed, start_up, ranks)
        if death is None:
            print(f"the run came to its end after {number} kills: --steps gives it more", flush=True)
            break
        deaths.append(death)
        replace_text(journal, json.dumps([asdict(each) for each in deaths]))
        print(f"kill {len(deaths):3}/{options.kills}  {death}", flush=True)
    killed = finish(command(len(deaths)), folder / "killed")
    result = compare(alone, killed, options.tolerance)
    planned, used = examples(folder / "alone"), examples(folder / "killed")
    result["steps_with_other_examples"] = sum(planned[step] != used.get(step) for step in planned)
    ranks = options.ranks[0] if len(options.ranks) == 1 else options.ranks
    hits = dict(Counter(death.hit for death in deaths))
    print(f"{len(deaths)} kills ({hits}), {steps} steps: {result}", flush=True)
    facts = {"kills": len(deaths), "hits": hits, "ranks": ranks, "steps": steps, **result}
    facts["examples"] = sum(map(len, planned.values()))
    where = {"machine": platform.platform(), "torch": torch.__version__, "seed": options.seed}
    write_json(options.output, facts | where | {"deaths": [asdict(death) for death in deaths]})
    equal = result["differing"] == result["steps_with_other_examples"] == 0
    return EXIT_DONE if equal else EXIT_FAILED


if __name__ == "__main__":
    run(main)
