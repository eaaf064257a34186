"""Model ``puma`` for EleutherAI's lm-evaluation-harness.

``python -m pipeline.evaluation.harness --model puma --model_args checkpoint=RUN --tasks ...`` is the
harness's command line with this model registered; run ``pip install lm_eval`` first. The model is imported
when it is asked for: torch takes seconds, and neither help nor a wrong option needs it.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.cli import run
from pipeline.base.extras import extra


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness, which reads the command line itself."""
    with extra("eval", "pipeline.evaluation.harness"):
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    model_registry.register("puma", target="pipeline.evaluation.harness_model:PumaLM")
    cli_evaluate()


if __name__ == "__main__":
    run(main)
