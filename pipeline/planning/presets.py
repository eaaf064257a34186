"""Plan the shipped configurations for their GPUs, and build the table of docs/explanation/presets.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.engine.build import engine_settings
from pipeline.planning.assumptions import Assumptions
from pipeline.planning.gpus import GIB, GPUS
from pipeline.planning.memory import Zero
from pipeline.planning.plan_report import duration
from pipeline.planning.run_plan import SECONDS_A_DAY, Planner, RunPlan

DOCUMENT = Path("docs/explanation/presets.md")
BEGIN, END = "<!-- table: tools/plan_presets.py -->\n", "<!-- end of table -->\n"


@dataclass(frozen=True)
class Preset:
    """A configuration on a number of GPUs.

    Attributes:
        name: name of the YAML in configs/.
        gpus: world size.
        gpu: GPU type.
        settings: options that override the YAML.
    """

    name: str
    gpus: int
    gpu: str = "h100"
    settings: tuple[str, ...] = ()

    def load(self, root: Path) -> Config:
        """Load the configuration; `root` is the project folder."""
        config = configuration.load(["--config", str(root / "configs" / f"{self.name}.yaml"), *self.settings])
        config.engine.deepspeed_config = str(root / config.engine.deepspeed_config)
        return config

    def plan(self, config: Config) -> RunPlan:
        """Return the plan of the loaded configuration, with the micro-batch of the YAML."""
        rows = config.model.vocab_size
        assert rows is not None, "presets set model.vocab_size"
        zero = Zero.of(engine_settings(config, self.gpus))
        return Planner(config, zero, rows, GPUS[self.gpu], Assumptions()).plan(self.gpus)


def _json(name: str) -> tuple[str, ...]:
    return (f"--engine.deepspeed_config=ds_configs/{name}.json",)


PRESETS = (
    Preset("sudoku_6", 1),
    Preset("sudoku_9", 8),
    Preset("tinygsm_125m", 8),
    Preset("tinygsm_125m", 8, "a100-40"),
    Preset("text_350m", 8),
    Preset("text_1b", 16),
    Preset("text_3b", 64),
    Preset("text_8b", 128),
    Preset("text_8b", 128, settings=_json("zero3")),
    Preset("text_8b", 16, settings=_json("zero3_offload_cpu")),
    Preset("text_8b", 8, settings=(*_json("zero3_offload_nvme"), "--optimizer.ema_decay=null")),
)


def table(root: Path) -> str:
    """Return the table of all presets as Markdown."""
    lines = [
        "| configuration | parameters | DeepSpeed | GPUs | memory of a GPU | largest micro-batch | a step "
        "| the run | checkpoint |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        config = preset.load(root)
        plan, settings = preset.plan(config), Path(config.engine.deepspeed_config).stem
        cells = [
            f"`{preset.name}`",
            f"{plan.parameters / 1e6:,.1f} M",
            f"`{settings}`",
            f"{preset.gpus} x {preset.gpu}",
            f"{plan.memory.total / GIB:.1f} of {plan.usable / GIB:.1f} GiB at {plan.micro_batch}",
            str(plan.largest_micro_batch),
            duration(plan.seconds["step"]),
            duration(plan.days * SECONDS_A_DAY),
            f"{plan.checkpoint / 1e9:,.2f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(document: str, made: str) -> str:
    """Return `document` with the text between its two markers replaced by `made`."""
    before, _, rest = document.partition(BEGIN)
    return before + BEGIN + made + END + rest.partition(END)[2]
