"""Model ``puma`` for EleutherAI's lm-evaluation-harness.

``python -m pipeline.evaluation.harness --model puma --model_args checkpoint=RUN --tasks ...`` is the
harness's command line with this model registered; run ``pip install lm_eval`` first. The model is imported
when it is asked for: torch takes seconds, and neither help nor a wrong option needs it. Ranks that torchrun
or srun starts share its requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.base.cli import run
from pipeline.base.extras import extra

SEVERAL = any(int(os.environ.get(name, "1")) > 1 for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the harness, which reads the command line itself."""
    with extra("eval", "pipeline.evaluation.harness"):
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    model_registry.register("puma", target="pipeline.evaluation.harness_model:PumaLM")
    if not SEVERAL:
        cli_evaluate()
        return
    from pipeline.evaluation.harness_model import on_all_ranks

    on_all_ranks(cli_evaluate)


if __name__ == "__main__":
    run(main, of_ranks=SEVERAL)
