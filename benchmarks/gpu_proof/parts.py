"""The parts of the proof: which program measures what, and how long it may take.

Each part is a program of its own that writes its figures as JSON to {output}. A dry run gives the same
programs a CPU and miniature shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
HERE = "benchmarks.gpu_proof"
PRESETS = {"125M": "tinygsm_125m", "350M": "text_350m", "1B": "text_1b"}
RANDOM_MASKING = """
    --objective.kind random_masking --objective.stages_increment 0 --objective.stages_first_increase null
    --objective.stages_interval null --objective.stages_maximum null --objective.threshold null
""".split()
MINIATURE = """
    --model.layers 2 --model.hidden_size 64 --model.heads 4 --model.intermediate_size 96
    --model.vocab_size 500 --data.sequence_length 32 --train.micro_batch_size 2
""".split()
RESUMED = """
    model.layers=6 model.hidden_size=512 model.heads=8 model.intermediate_size=1536 model.vocab_size=32768
    data.sequence_length=512 data.padding=eos_targets train.global_batch_size=32 train.micro_batch_size=32
    evaluation.interval=30 checkpoint.interval=20
""".split()
LARGE_SAMPLING = """
    --layers 14 --hidden-size 512 --vocabulary 32000 --prompt 128 --answer 128 --block-size 32 --batch-size 32
    --repetitions 1
""".split()
MINIATURE_SAMPLING = """
    --layers 2 --hidden-size 32 --vocabulary 50 --prompt 4 --answer 8 --block-size 4 --repetitions 1
""".split()
MINIATURE_RESUMED = """
    schedule.warmup_steps=2 evaluation.interval=6 checkpoint.interval=3
""".split()


@dataclass(frozen=True)
class Part:
    """One program of the proof.

    Attributes:
        name: of the part, as --only takes it.
        title: what it measures.
        arguments: of python; "{output}" is its JSON file, "{folder}" where it may write.
        seconds: it is expected to take on one H100.
        limit: seconds after which it is ended.
        ranks: processes, started by torchrun when there are several.
        kind: of its figures: "ceilings", "numerics", "training", "step", "options", "resume", "sampling",
            "tests" or "links".
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    seconds: int
    limit: int
    ranks: int = 1
    kind: str = ""

    def command(self) -> tuple[str, ...]:
        """Return the arguments of python, torchrun's included."""
        start = (*TORCHRUN, str(self.ranks)) if self.ranks > 1 else ()
        return (*start, *self.arguments)


def all_parts(gpus: int = 1, dry: bool = False) -> list[Part]:
    """Return the parts in the order of their worth: when time runs out, the last ones are missing."""
    sampled = LARGE_SAMPLING if not dry else MINIATURE_SAMPLING
    step = [*shape(dry), "--repetitions", "1" if dry else "5"]
    options = [*step, "--only", "head"] if dry else step  # the other groups are tested by themselves
    return [
        _part("ceilings", "rates of the card", 10, 60, "-m", f"{HERE}.ceilings"),
        _part("numerics", "head and attention against float64", 55, 120, "-m", f"{HERE}.numerics"),
        *links(gpus),
        *trainings(gpus, dry),
        resume(gpus, dry),
        _part("step", "a step beside full logits", 50, 120, "-m", "benchmarks.train_step", *step),
        _part("tests", "tests marked gpu", 60, 150, "-m", f"{HERE}.tests"),
        _part("options", "options of a step", 80, 150, "-m", "benchmarks.step_options", *options),
        _part("sampling", "sampling with and without cache", 40, 90, "-m", "benchmarks.sampling", *sampled),
    ]


def _part(name: str, title: str, seconds: int, limit: int, *program: str, ranks: int = 1) -> Part:
    """Return a part that is the only one of its kind."""
    return Part(name, title, (*program, "--output", "{output}"), seconds, limit, ranks, name)


def links(gpus: int) -> list[Part]:
    """Return the measurement of collectives, where there are any."""
    program = ("-m", f"{HERE}.links")
    return [] if gpus == 1 else [_part("links", "rates of collectives", 20, 90, *program, ranks=gpus)]


def shape(dry: bool) -> list[str]:
    """Return the options that the benchmarks of a step share."""
    return ["--shape", "miniature" if dry else "paper", "--batch-size", "2" if dry else "32"]


def trainings(gpus: int, dry: bool) -> Iterator[Part]:
    """Yield the trainings of the presets by PUMA: the smallest with everything, the others once."""
    json = "--engine.deepspeed_config"
    zero2, zero3 = (json, "ds_configs/zero2.json"), (json, "ds_configs/zero3.json")
    plain = ("--engine.kind", "plain")
    compiled = ("--engine.compile", "true", "--engine.compile_functions", "true")
    one_card = [("125M_plain", "PUMA, plain engine", plain)] if gpus == 1 else []
    several = [] if gpus == 1 else [
        ("1B_zero3", "PUMA, ZeRO-3", zero3),
        ("1B_zeropp", f"PUMA, ZeRO++ with a secondary copy on {gpus} ranks", (json, "{folder}/zeropp.json")),
    ]  # fmt: skip
    if gpus > 1 and not dry:  # its kernels are CUDA's
        several.append(("1B_zeropp_int", "PUMA, ZeRO++, int8 and int4", (json, "{folder}/zeropp_int.json")))
    cases: list[tuple[str, str, Sequence[str]]] = [
        ("125M_zero2", "PUMA, ZeRO-2", zero2),
        ("125M_zero3", "PUMA, ZeRO-3", zero3),
        ("125M_compiled", "PUMA, ZeRO-2, compiled", (*zero2, *compiled)),
        ("125M_zero3_compiled", "PUMA, ZeRO-3, compiled", (*zero3, *compiled)),
        ("1B_compiled", "PUMA, ZeRO-3, compiled", (*zero3, *compiled)),
        ("125M_zero2_random", "random masking, ZeRO-2", (*zero2, *RANDOM_MASKING)),
        ("350M_compiled", "PUMA, ZeRO-2, compiled", (*zero2, *compiled)),
        *one_card,
        *several,
    ]
    for name, how, settings in cases:
        size = name.split("_")[0]
        steps = ["--warmup", "1", "--steps", "1"] if dry else ["--steps", "10" if size == "1B" else "30"]
        arguments = ["-m", f"{HERE}.training", "--output", "{output}", *steps, "--"]
        config = ["--config", f"configs/{PRESETS[size]}.yaml", "--objective.kind", "puma"]
        arguments += [*config, *settings, *(MINIATURE if dry else [])]
        seconds = (40 if size == "1B" else 30) + (30 if "--engine.compile" in settings else 0)
        yield Part(name, f"{size}: {how}", tuple(arguments), seconds, 120, gpus, "training")


def resume(gpus: int, dry: bool) -> Part:
    """Return the run that is killed, resumed and compared with one that was left alone."""
    size = MINIATURE_RESUMED if dry else RESUMED
    if dry and gpus == 1:
        size = ["engine.kind=plain", *size]  # starts in half of the time
    arguments = ["-m", "benchmarks.kill_resume", "--kills", "1", "--steps", "40" if dry else "60"]
    arguments += ["--ranks", str(gpus), "--folder", "{folder}/kill_resume", "--output", "{output}"]
    arguments += ["--set", "engine.deterministic=true", *size]
    return Part("resume", "killed and resumed, bit for bit", tuple(arguments), 100, 200, 1, "resume")
