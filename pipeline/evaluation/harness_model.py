"""A run as a model of the lm-evaluation-harness; see harness.py.

A log-likelihood is the negative bound of `pipeline.evaluation.likelihood`: a sum over all masks for short
answers, an estimate with a fixed seed for longer ones, and exact for autoregressive models.

On several ranks the harness runs on the first one alone. All ranks load the model and share its requests. The
noise of a request depends on its number, so the results equal those of one rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.checkpoint.load_model import load_model
from pipeline.corpus.chat import Written
from pipeline.corpus.chat_template import read_template, rendered
from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.reading import BadRecord
from pipeline.corpus.special_text import SpecialEncoder
from pipeline.decoding.batching import MaskedSequence
from pipeline.decoding.completing import Completion, fill_sequences
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.harness_arguments import ModelArguments
from pipeline.evaluation.likelihood import AnswerScore, score_answers
from pipeline.ranks import Ranks, join_ranks

with extra("eval", "pipeline.evaluation.harness"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Tokens = list[int]
Pair = tuple[Tokens, Tokens]  # a context and its continuation
LENGTH = 256  # default answer length in tokens
_peers = Ranks()  # those that share the requests; see `on_all_ranks`


@register_model("puma")
class PumaLM(TemplateLM):
    """A run or a checkpoint as a model of the harness."""

    def __init__(self, checkpoint: str = "", **given: Any) -> None:
        """Load the model.

        Args:
            checkpoint: run folder, RUN:STEP, or checkpoint folder.
            given: the other attributes of `ModelArguments`, and fields of `SamplingSettings`.

        Raises:
            UserError: for a missing checkpoint or a bad setting.
        """
        super().__init__()
        arguments = ModelArguments.read({"checkpoint": checkpoint} | given)
        self.settings = arguments.sampler
        wanted = arguments.device or "cuda"  # the harness's default, with or without a GPU
        usable = torch.cuda.is_available() or not wanted.startswith("cuda")
        self._device = torch.device(wanted if usable else "cpu")
        if _peers.world_size > 1:
            self._device = _peers.device
        _tell_peers("load", {"checkpoint": checkpoint} | given)
        with _peers.agreeing():
            self.loaded = load_model(
                Path(arguments.checkpoint),
                self._device,
                weights=arguments.weights,
                verify=arguments.verify,
                ranks=_peers,
            )
        template = arguments.chat_template
        self.template = None if template is None else read_template(Path(template))
        self.encoder = SpecialEncoder(WordEncoder(self.loaded.tokenizer, cut=False))
        self.batch_size, self.draws = int(arguments.batch_size), arguments.draws
        self.check_greedy = arguments.check_greedy
        # Prompts and answers of pairs were tokenized separately, packed text as a whole.
        self.backend = "causal" if self.loaded.config.data.kind == "packed" else "seq2seq"

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token, also used as the context of a text without one."""
        return self.loaded.tokenizer.eos

    @property
    def limit(self) -> int:
        """The trained sequence length in tokens."""
        return self.loaded.config.data.sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, for the harness's caches."""
        return self.loaded.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> Tokens:
        """Return the tokens of a text; no special tokens are added, and with a template those in it count."""
        text = string if self.template is None else Written.apart([string])
        ids: Tokens = self.encoder.encode_batch([text])[0].tolist()
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template for the harness's log."""
        if self.template is None:
            remedy = "add chat_template=FOLDER to --model_args"
            self.template = self.loaded.own_template("--apply_chat_template", remedy)
        return self.template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as text; without a generation prompt, the last one is to be continued."""
        given = chat_history if add_generation_prompt else chat_history[:-1]
        try:
            text = rendered(self.chat_template(), given, add_generation_prompt=True)
        except BadRecord as bad:
            raise UserError(f"{bad.detail}: give another chat_template in --model_args.") from None
        return text if add_generation_prompt else text + chat_history[-1]["content"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Tokens, Tokens]], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether decoding finds it.

        Long contexts are truncated on the left.
        """
        pairs = []
        for (_, text), context, continuation in requests:
            if len(continuation) > self.limit:
                raise UserError(
                    f"the continuation {text[:40]!r}... has {len(continuation)} tokens, which exceeds the "
                    f"trained sequence length {self.limit}: remove or shorten it."
                )
            room = self.limit - len(continuation)
            pairs.append((context[-room:] if room else [], continuation))
        scores = self._shared("scores", pairs)
        greedy = [False] * len(pairs)
        if self.check_greedy:
            prompts = [(context, len(answer)) for context, answer in pairs]
            found = self._shared("completions", prompts, self.settings)
            greedy = [one.tokens == answer for one, (_, answer) in zip(found, pairs, strict=True)]
        return [(-score.nll, same) for score, same in zip(scores, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, scored in windows with one token of context."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.eot_token_id, self.limit - 1, 1):
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        scores = self._shared("scores", pairs)
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] -= score.nll
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the first stop string.

        Long contexts are truncated on the left. Of the task's settings, max_gen_toks and until are used; with
        do_sample also temperature and top_p.
        """
        alike: dict[SamplingSettings, list[int]] = defaultdict(list)
        prompts = []
        for number, request in enumerate(requests):
            context, task = request.args
            ids = self.tok_encode(context) or [self.eot_token_id]
            length = int(task.get("max_gen_toks", LENGTH))
            if len(ids) + length > self.limit:  # leave at least half of the sequence to the answer
                length = max(self.limit - len(ids), min(length, self.limit // 2))
            prompts.append((ids[-(self.limit - length) :], length))
            alike[self._settings_of(task)].append(number)
        texts: dict[int, str] = {}
        for settings, numbers in alike.items():
            found = self._shared("completions", [prompts[i] for i in numbers], settings)
            for number, completion in zip(numbers, found, strict=True):
                stops = requests[number].args[1].get("until") or []
                texts[number] = before_first(completion.text, [stops] if isinstance(stops, str) else stops)
        return [texts[number] for number in range(len(requests))]

    def _settings_of(self, task: dict[str, Any]) -> SamplingSettings:
        """Return the sampler settings for the generation settings of a task."""
        if not task.get("do_sample", False):
            return self.settings
        changes = {name: task[name] for name in ("temperature", "top_p") if name in task}
        settings = dataclasses.replace(self.settings, **changes)
        settings.check()
        return settings

    def _shared(self, work: Literal["scores", "completions"], items: Sequence[Any], *more: Any) -> list[Any]:
        """Return what `_scores` or `_completions` finds for all items; every rank does its part of them."""
        _tell_peers(work, (items, *more))
        return self.part_of(work, items, *more)

    def part_of(self, work: str, items: Sequence[Any], *more: Any) -> list[Any]:
        """Return what all ranks find for all items; every rank calls this."""
        numbers = range(_peers.rank, len(items), _peers.world_size)
        with _peers.agreeing():
            found = getattr(self, f"_{work}")([items[i] for i in numbers], numbers, *more)
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(_peers.all_gather(found)):
            results[rank :: _peers.world_size] = part
        return results

    def _scores(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> list[AnswerScore]:
        common = self.loaded, pairs, self.draws, self.batch_size, self.settings.seed
        return score_answers(*common, numbers=numbers)

    def _completions(
        self, prompts: Sequence[tuple[Tokens, int]], numbers: Sequence[int], settings: SamplingSettings
    ) -> list[Completion]:
        """Return the continuation of each (prompt, length)."""
        mask = self.loaded.tokenizer.mask
        sequences = [MaskedSequence.behind(ids, [mask] * length) for ids, length in prompts]
        common = self.loaded, sequences, settings, self.batch_size, self.eot_token_id
        return fill_sequences(*common, numbers=numbers)


def on_all_ranks(harness: Callable[[], None]) -> None:
    """Run the harness on the first rank, and its model on all."""
    global _peers
    _peers = join_ranks()
    _peers.connect("gloo", timedelta(days=7))  # requests may take very different times
    with contextlib.ExitStack() as stack:
        stack.callback(_peers.disconnect)
        if _peers.is_first:
            stack.callback(_tell_peers, "end")
            harness()
        else:
            _serve()


def _tell_peers(work: str, arguments: Any = None) -> None:
    """Let the other ranks, which wait in `_serve`, join in some work of the first one."""
    if _peers.world_size > 1 and _peers.is_first:
        _peers.all_gather((work, arguments))


def _serve() -> None:
    """Do this rank's part of what the first rank's model is asked, until that has ended."""
    model: PumaLM | None = None
    while True:
        work: str
        arguments: Any
        work, arguments = _peers.all_gather(("", None))[0]
        if work == "end":
            return
        with contextlib.suppress(UserError):  # the first rank has it, too
            if work == "load":
                model = PumaLM(**arguments)
            elif model is not None:
                model.part_of(work, *arguments)


def before_first(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first occurrence of any stop string."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
