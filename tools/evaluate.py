"""Evaluate a trained model: answers to puzzles or word problems, the likelihood of text, or samples of it.

Run it as one process, or with torchrun or srun on several ranks, which share the items. With --output, the
same command resumes an interrupted evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.cli import ToolParser, option, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.base.files import sha256_of
from pipeline.base.progress import Progress
from pipeline.checkpoint.manifest import MANIFEST, find, is_export
from pipeline.checkpoint.options import add_options as add_checkpoint_options
from pipeline.corpus.arguments import add_template_options
from pipeline.data.paths import bin_path
from pipeline.decoding.sampling import SamplingSettings, add_options, read_options
from pipeline.evaluation.defaults import DRAWS
from pipeline.evaluation.results import Results
from pipeline.evaluation.tasks import TASKS
from pipeline.huggingface.export_options import check_there

if TYPE_CHECKING:
    from pipeline.checkpoint.load_model import Loaded
    from pipeline.evaluation.measures import Measure
    from pipeline.ranks import Ranks

LIKELIHOOD = "likelihood"
PERPLEXITY = "generative-perplexity"  # of samples
OF_SAMPLES = ["scorer", "prefix_length"]
OF_PROMPTS = ["prompt_format", "chat_template", "chat"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = ToolParser(__doc__ or "")
    add_checkpoint_options(parser, exports=True)
    parser.add_argument(
        "--untrained", action="store_true", help="evaluate the initial weights, as a baseline"
    )
    parser.add_argument(
        "--task", choices=[*TASKS, LIKELIHOOD, PERPLEXITY], default="sudoku", help="what to measure"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="jsonl file of items; for likelihood and generative-perplexity also a dataset PREFIX",
    )
    parser.add_argument("--prompt-key", help="key of the prompt (default: question for GSM8K, else prompt)")
    parser.add_argument("--answer-key", help="key of the answer (default: answer)")
    parser.add_argument(
        "--text-key", help="likelihood and generative-perplexity: the texts' key, if not pairs"
    )
    parser.add_argument(
        "--scorer",
        type=Path,
        help="generative-perplexity: a causal model in the format of transformers, or an autoregressive run",
    )
    parser.add_argument(
        "--prefix-length",
        type=int,
        default=0,
        help="generative-perplexity: tokens of a text that the model is given; 0 = none",
    )
    add_template_options(parser, "make the prompt a message of a user")
    parser.add_argument("--prompt-format", default="{prompt}", help="template of the model's input")
    parser.add_argument(
        "--length", type=int, help="answer length in tokens (default: the task's, or all that fit)"
    )
    parser.add_argument("--limit", type=int, help="use only the first LIMIT items")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="likelihood: masks per sequence, an even number"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="sequences per batch")
    parser.add_argument("--output", type=Path, help="JSON file for settings, results and every answer")
    parser.add_argument(
        "--restart", action="store_true", help="discard the results in --output and start over"
    )
    add_options(parser)
    options = parser.parse_args(arguments)
    require_at_least_one(options, "length", "batch_size", "limit")
    if options.draws < 2 or options.draws % 2:
        raise UserError(f"--draws is {options.draws}: give an even number, 2 or more.")
    for name in without_effect(options.task):
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"{option(name)} has no effect with --task {options.task}: leave it out.")
    if options.output is not None and options.output.resolve() == options.data.resolve():
        raise UserError(f"--output {options.output} is also --data, the file of items: choose another file.")
    if options.task == PERPLEXITY and options.scorer is None:
        raise UserError(
            f"--scorer is missing: --task {PERPLEXITY} needs a causal model that scores the samples."
        )
    if options.prefix_length < 0:
        raise UserError(f"--prefix-length is {options.prefix_length}: it must be 0 or more.")
    if "{prompt}" not in options.prompt_format:
        raise UserError(f"--prompt-format is {options.prompt_format!r}: it must contain {{prompt}}.")
    read_options(options)  # refuses the sampler's
    check_there(options.checkpoint)
    return options


def without_effect(task: str) -> list[str]:
    """Return the options that have no effect with a task."""
    if task == PERPLEXITY:
        return ["draws", *OF_PROMPTS]
    if task != LIKELIHOOD:
        return ["draws", "text_key", *OF_SAMPLES]
    sampler = [field.name for field in dataclasses.fields(SamplingSettings) if field.name != "seed"]
    return ["length", *OF_PROMPTS, *OF_SAMPLES, *sampler]


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return every setting that affects the results, by option."""
    from pipeline.corpus.chat_template import read_template  # see `main`
    from pipeline.evaluation.scorers import identity_of
    from pipeline.huggingface.loading import fingerprint

    without = {"batch_size", "output", "restart", "no_verify", *without_effect(options.task)}
    data = options.data if options.data.is_file() else bin_path(options.data)
    chosen = {option(name): value for name, value in vars(options).items() if name not in without}
    # Another run may have written its checkpoint to the same folder.
    if is_export(options.checkpoint):
        chosen |= {"sha256 of the export": fingerprint(options.checkpoint)}
    else:
        chosen |= {"sha256 of the checkpoint's manifest": sha256_of(options.checkpoint / MANIFEST)}
    chosen |= {
        "--checkpoint": str(options.checkpoint.resolve()),
        "--data": str(options.data),
        "sha256 of the data": sha256_of(data),
    }
    if options.chat_template is not None:
        chosen |= {"--chat-template": read_template(options.chat_template)}
    if options.scorer is not None:
        chosen |= {
            "--scorer": str(options.scorer.resolve()),
            "hash of the scorer": identity_of(options.scorer),
        }
    return chosen


def measure_of(options: argparse.Namespace, loaded: Loaded, ranks: Ranks, stack: ExitStack) -> Measure:
    """Return the measure that the options select."""
    from pipeline.corpus.chat_template import read_template  # see `main`
    from pipeline.evaluation.measures import Answers, Likelihoods
    from pipeline.evaluation.pairs import read_pairs
    from pipeline.evaluation.quality import GenerativePerplexity, read_excerpts
    from pipeline.evaluation.scorers import load_scorer

    keys: tuple[str, ...] = (options.prompt_key or "prompt", options.answer_key or "answer")
    keys = (options.text_key,) if options.text_key else keys
    if options.task == PERPLEXITY:
        of = loaded.tokenizer, loaded.config.data.sequence_length
        excerpts = read_excerpts(
            options.data, keys, *of, options.prefix_length, options.length, options.limit
        )
        scorer = load_scorer(options.scorer, ranks.device)
        samples = GenerativePerplexity(excerpts, scorer, read_options(options))
        samples.check(loaded.tokenizer, loaded.config)
        return samples
    if options.task == LIKELIHOOD:
        pairs, too_long = read_pairs(options.data, keys, loaded, options.limit)
        return Likelihoods(pairs, too_long, options.draws, options.seed)
    task = stack.enter_context(closing(TASKS[options.task]()))
    names = (options.prompt_key or task.keys[0], options.answer_key or task.keys[1])
    items = task.read(options.data, names)[: options.limit]
    template = options.chat_template and read_template(options.chat_template)
    if options.chat:
        template = loaded.own_template("--chat", "name one by --chat-template")
    answers = Answers(task, items, read_options(options), options.length, options.prompt_format, template)
    answers.check(loaded)
    return answers


def find_models(options: argparse.Namespace, ranks: Ranks) -> None:
    """Set the folders of checkpoint and scorer, alike on every rank: a run may write a newer one."""
    from pipeline.evaluation.scorers import find_scorer  # see `main`

    folders = options.checkpoint, options.scorer
    with ranks.agreeing():
        if ranks.is_first:
            checkpoint, scorer = folders
            folders = (
                checkpoint if is_export(checkpoint) else find(checkpoint)[0],
                scorer and find_scorer(scorer),
            )
    options.checkpoint, options.scorer = ranks.all_gather(folders)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate and print the results; for puzzles the last line is ``solved X.XX of N held-out puzzles``."""
    options = parse(arguments)
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.evaluation.measures import measure_items
    from pipeline.huggingface.loading import load_any
    from pipeline.ranks import join_ranks

    with ExitStack() as stack:
        ranks = join_ranks()
        ranks.connect("gloo", timedelta(days=7))  # items may take very different times
        stack.callback(ranks.disconnect)
        find_models(options, ranks)
        with ranks.agreeing():
            loaded = load_any(
                options.checkpoint, ranks.device, options.untrained, options.weights,
                verify=not options.no_verify, ranks=ranks,
            )  # fmt: skip
            measured = measure_of(options, loaded, ranks, stack)
        results = None
        if options.output is not None:
            results = Results(options.output, settings_of(options), options.restart)
        rows = measure_items(
            measured, loaded, ranks, options.batch_size, results,
            lambda total, done: Progress(total, done, "item", enabled=ranks.is_first),
        )  # fmt: skip
        if ranks.is_first:
            figures = measured.figures(rows)
            if results is not None:
                results.finish(figures, rows)
            print(measured.summary(figures))


if __name__ == "__main__":
    run(main, of_ranks=True)
