"""Turn a YAML file and a command line into a checked `Config`, and back."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

import jsonargparse
import yaml

from pipeline.base.errors import UserError, nearest
from pipeline.config.checks import require
from pipeline.config.data import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.config.monitor import MonitorConfig
from pipeline.config.objective import ObjectiveConfig
from pipeline.config.resilience import GuardConfig, WatchdogConfig
from pipeline.config.run import CheckpointConfig, EvaluationConfig, ProfilingConfig
from pipeline.config.training import (
    HIGHEST_LEARNING_RATE,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

_GROWTH = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}  # power of the batch by which the learning rate grows


@dataclass
class Config:
    """A run.

    Args:
        run_dir: Run folder, for checkpoints, TensorBoard events and the resolved configuration. If it holds
            checkpoints, training resumes from the newest.
    """

    run_dir: str
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    @property
    def slots(self) -> int:
        """The most examples in flight at any time, over all ranks."""
        return self.train.batch_at(self.train.steps) * self.objective.turns

    def peak_rate(self, step: int) -> float:
        """Return the peak learning rate for the batch of `step`."""
        growth = self.train.batch_at(step) / self.train.global_batch_size
        return self.optimizer.learning_rate * growth ** _GROWTH[self.schedule.batch_scaling]

    def changes_at(self, step: int) -> bool:
        """Return whether `step` is the first of another objective or data mix."""
        mixes = (phase.first_step for phase in self.data.phases)
        return step == self.objective.switch_step or step in mixes

    def check(self) -> None:
        """Raise a `UserError` for the first invalid setting."""
        require(bool(self.run_dir.strip()), "run_dir is empty: name the folder of the run.")
        for section in (self.model, self.optimizer, self.train):
            section.check()
        self.data.check(self.train.steps)
        self.objective.check(self.model.prediction, self.data.sequence_length, self.train.steps)
        self.schedule.check(self.train.steps)
        require(
            self.schedule.rewarm_steps == 0 or self.train.branch_from is not None,
            f"schedule.rewarm_steps is {self.schedule.rewarm_steps}, which has no effect without "
            "train.branch_from: leave it out, or set schedule.warmup_steps.",
        )
        self._check_ramp()
        self.checkpoint.check(self.evaluation.interval)
        self.evaluation.check()
        self.engine.check(self.model, self.data.sequence_length)
        self.monitor.check()
        self.guard.check()
        self.watchdog.check()
        self.profiling.check(self.engine, self.train.steps)

    def _check_ramp(self) -> None:
        scaling, optimizer = self.schedule.batch_scaling, self.optimizer
        highest = max(optimizer.learning_rate, optimizer.muon_learning_rate or 0.0)
        rate = self.peak_rate(self.train.steps) * highest / optimizer.learning_rate
        require(
            scaling == "none" or bool(self.train.batch_ramp),
            f"schedule.batch_scaling is {scaling!r}, which has no effect without train.batch_ramp: leave it "
            "out, or set train.batch_ramp.",
        )
        require(
            scaling == "none" or rate <= HIGHEST_LEARNING_RATE,
            f"schedule.batch_scaling is {scaling!r}, by which train.batch_ramp raises the learning rate to "
            f"{rate:.4g}: keep it at {HIGHEST_LEARNING_RATE} or less.",
        )
        turns = self.objective.turns
        for number, larger in enumerate(self.train.batch_ramp):
            for section, first, _ in self.data.by_phase():
                # Slots that wait for their turn hold its examples, and no longer tell what they began before.
                require(
                    not larger.first_step < first < larger.first_step + turns,
                    f"{section}.first_step is {first}, fewer than objective.turns = {turns} steps after "
                    f"train.batch_ramp[{number}].first_step = {larger.first_step}: let both begin at the "
                    f"same step, or the phase at {larger.first_step + turns} or later.",
                )


@cache
def known_keys(cls: type = Config, prefix: str = "") -> Mapping[str, Any]:
    """Return the type of every dotted configuration key, sections included."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        keys[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            keys |= known_keys(typing.cast(type, hint), f"{prefix}{name}.")
    return keys


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted keys; an empty one stays, so that its key is seen."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; the default one silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        keys = [self.construct_object(key) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise a `UserError` with the file and line if it is not valid."""
    require(path.is_file(), f"configuration {path} does not exist: give --config the path of a YAML file.")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {_problem(error)}.") from None
    require(isinstance(tree, dict), f"{path} holds no settings: it must be a YAML mapping of sections.")
    return tree


def _problem(error: Exception) -> str:
    """Return what is wrong in a YAML, on one line."""
    return " ".join(str(getattr(error, "problem", error)).split())


def check_keys(keys: Sequence[str], where: str) -> None:
    """Raise a `UserError` for the first unknown key, and suggest the nearest known one."""
    known = known_keys()
    for key in keys:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(key, known)}")


def check_yaml(tree: dict[str, Any], where: str) -> None:
    """Raise a `UserError` for the first unknown key of a YAML file, at any depth, or a section that is none.

    jsonargparse passes some of them over, and imports the module that a ``class_path`` in a list names: a
    checkpoint's YAML could run code.
    """
    try:
        leaves = flatten(tree)
    except RecursionError:
        raise UserError(f"{where}: a section holds itself, by an anchor: write its settings out.") from None
    check_keys(list(leaves), where)
    hints = known_keys()
    for key, value in leaves.items():
        require(
            isinstance(value, dict) or not dataclasses.is_dataclass(hints[key]),
            f"{where}: {key} is {in_yaml(value)}, but it is a section: give its settings as KEY: VALUE, or "
            "leave it out.",
        )
        known = _keys_of(hints[key])
        for number, entry in enumerate(value if known and isinstance(value, list) else []):
            for name in flatten(entry) if isinstance(entry, dict) else []:
                if name not in known:
                    raise UserError(
                        f"{where}: {key}[{number}]: unknown key {name!r}.{nearest(name, known)} Known: "
                        f"{', '.join(known)}."
                    )


_QUESTIONS = ("--help", "--evaluation.tasks.help", "--print_config")  # options that print something and exit


@cache
def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of `pipeline.train`; its help texts are the docstrings of the config dataclasses."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m pipeline.train",
        usage="%(prog)s --config configs/X.yaml [--section.key VALUE ...]",
        description="Pretrain a masked diffusion model. The same command resumes an interrupted run.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of the run (configs/).")
    parser.add_class_arguments(Config)
    return parser


def load(arguments: Sequence[str]) -> Config:
    """Return the checked configuration for a command line, ``--config X.yaml [--section.key value ...]``.

    Raises:
        UserError: if a file is missing or damaged, a key is unknown or a value is invalid.
    """
    # The deepspeed launcher appends --local_rank=N, which is also in the environment.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    require(bool(arguments), "give --config and the YAML of a run, such as configs/tiny_text.yaml.")
    known = known_keys()
    files, overrides, replacing = [], False, []
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        given = [option[2:]]
        if option == "--config":
            value = value or "".join(arguments[position + 1 : position + 2])
            require(bool(value), "--config needs the path of a YAML file.")
            tree = read_yaml(Path(value))
            check_yaml(tree, value)
            files.append(value)
            given = list(flatten(tree))
        elif option.startswith("--") and option not in _QUESTIONS:
            key = option[2:].rstrip("+")
            check_keys([key], "command line")
            _check_json(key, value or "".join(arguments[position + 1 : position + 2]))
            overrides = True
        # jsonargparse fills entries of a list of sections from those of an earlier list of equal length.
        replacing += [f"--{key}=[]" for key in given if typing.get_origin(known.get(key)) is list]
        replacing.append(argument)
    parser = build_parser()
    where = ", ".join(files) + (" and the command line" if overrides and files else "")
    try:
        parsed = parser.parse_args(replacing)
        _check_values(parsed.as_dict(), Config)
        values = parser.instantiate_classes(parsed)
        config = Config(**{k: v for k, v in values.items() if k != "config"})
        config.check()
    except jsonargparse.ArgumentError as error:
        raise UserError(f"{where or 'command line'}: {_explained(str(error))}") from None
    except UserError as error:
        raise UserError(f"{where or 'command line'}: {error}") from None
    return config


def _check_json(key: str, value: str) -> None:
    """Raise a `UserError` for an unknown key in the value of an option that names a section, or several."""
    hint = known_keys()[key]
    if not _keys_of(hint):
        return
    try:
        tree = yaml.load(value, _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"command line: --{key} is not valid YAML: {_problem(error)}.") from None
    if typing.get_origin(hint) is list and isinstance(tree, dict):
        tree = [tree]  # an entry that --KEY+ appends
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_yaml(tree, "command line")


def _check_values(values: dict[str, Any], cls: type, prefix: str = "") -> None:
    """Raise a `UserError` for null in place of a value, and for what nothing can hold."""
    for name, hint in typing.get_type_hints(cls).items():
        key, value = f"{prefix}{name}", values.get(name)
        entry = next(iter(typing.get_args(hint)), None)
        if dataclasses.is_dataclass(hint):
            _check_values(typing.cast(dict[str, Any], value), typing.cast(type, hint), f"{key}.")
        elif value is None:
            require(NoneType in typing.get_args(hint), f"{key} is null: it must be {described(hint)}.")
        elif isinstance(value, str):
            require(
                "\0" not in value and value.encode(errors="ignore").decode() == value,
                f"{key} is {value!r}: give a text in UTF-8, without NUL.",
            )
        elif isinstance(value, int):
            require(-(2**63) <= value < 2**63, f"{key} is {value}: give a whole number of 64 bits.")
        elif dataclasses.is_dataclass(entry):
            for number, each in enumerate(value):
                _check_values(each, typing.cast(type, entry), f"{key}[{number}].")


def _explained(message: str) -> str:
    """Rewrite jsonargparse's multi-line error as one line: the key, the value and the accepted values.

    For an entry of a list, the message names the key of the list and then the key of the entry.
    """
    keys = re.findall(r'Parser key "(.+?)"', message)
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    hint: Any = Config
    for key in keys:
        hint = _keys_of(hint).get(key)
    if keys and values and hint is not None:
        choices = [str(choice) for choice in typing.get_args(hint)]
        return (
            f"{': '.join(keys)} is {values[-1]}: it must be {described(hint)}.{nearest(values[-1], choices)}"
        )
    if message.startswith("unrecognized arguments"):
        return f"{message}. Give the YAML file by --config, and each setting as --section.key VALUE."
    lines = [line.strip(" -") for line in message.splitlines() if "given class_path" not in line]
    return re.sub(r'Parser key "(.+?)"', r"\1", " ".join(line for line in lines if line))


def _keys_of(hint: Any) -> Mapping[str, Any]:
    """Return the keys of a section, or of the sections in a list; empty for any other type."""
    entry = (*typing.get_args(hint), hint)[0]
    return known_keys(typing.cast(type, entry)) if dataclasses.is_dataclass(entry) else {}


def described(hint: Any) -> str:
    """Describe a type in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if typing.get_origin(hint) is list:
        entries = "[{key: value}]" if dataclasses.is_dataclass(parts[0]) else "[a, b]"
        return f"a list, such as {'[1, 2]' if parts[0] is float else entries}"
    if parts:  # X | None
        return " or ".join(described(part) for part in parts)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return names.get(hint, str(hint))


def defaults() -> dict[str, Any]:
    """Return the default of every setting, by dotted key; `run_dir`, which has none, is left out."""
    found = flatten(dataclasses.asdict(Config(run_dir="")))
    del found["run_dir"]
    return found


def in_yaml(value: Any) -> str:
    """Return the value of a setting as a configuration file has it, on one line."""
    shown = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return shown.removesuffix("\n").removesuffix("\n...")


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; `load` reads it back to an equal `Config`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
