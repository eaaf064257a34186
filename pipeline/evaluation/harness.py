"""Model ``puma`` for EleutherAI's lm-evaluation-harness.

``python -m pipeline.evaluation.harness --model puma --model_args checkpoint=RUN --tasks ...`` is the
harness's command line with this model registered; run ``pip install lm_eval`` first. The model is imported
when it is asked for: torch takes seconds, and neither help nor a wrong option needs it. Ranks that torchrun
or srun starts share its requests.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Sequence

from pipeline.base.cli import run
from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.base.launch import place
from pipeline.evaluation.harness_arguments import OWN_OPTIONS, ModelArguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness, which reads the command line itself."""
    with extra("eval", "pipeline.evaluation.harness"):
        from lm_eval._cli import HarnessCLI
        from lm_eval.api.registry import model_registry
        from lm_eval.utils import setup_logging
    model_registry.register("puma", target="pipeline.evaluation.harness_model:PumaLM")
    setup_logging()
    harness = HarnessCLI()
    with named_errors():
        options = harness.parse_args()
        if options.command == "run":
            check_options(options)

    def evaluate() -> None:
        try:
            harness.execute(options)
        except ValueError as error:  # known only after imports that take seconds
            if not str(error).startswith("Tasks not found"):
                raise
            raise UserError(f"--tasks: {error}: `ls tasks` in place of the options lists all.") from None

    if place().world_size == 1:
        evaluate()
        return
    from pipeline.evaluation.harness_model import on_all_ranks

    on_all_ranks(evaluate)


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Raise what the harness raises about its options as a `UserError`."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UserError(f"{str(error).rstrip('.')}: --help lists the options of the harness.") from None


def check_options(options: argparse.Namespace) -> None:
    """Raise for what the harness or the model refuses, before anything heavy is imported."""
    with extra("eval", "pipeline.evaluation.harness"):
        from lm_eval.config.evaluate_config import EvaluatorConfig

    logged = logging.root.manager.disable
    logging.disable()  # the harness reads its options again, and logs then
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = EvaluatorConfig.from_cli(copy.deepcopy(options))
    finally:
        logging.disable(logged)
    if config.model == "puma":
        for name in OWN_OPTIONS:
            if name in config.model_args:
                raise UserError(f"--model_args holds {name}: give it as --{name}.")
        ModelArguments.read(config.model_args | {"batch_size": config.batch_size}).check_files()


if __name__ == "__main__":
    run(main, of_ranks=place().world_size > 1)
