"""A run as a model of the lm-evaluation-harness; see harness.py.

A log-likelihood is the negative bound of `pipeline.evaluation.likelihood`: a sum over all masks for short
answers, an estimate with a fixed seed for longer ones, and exact for autoregressive models.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.checkpoint.load_model import load_model
from pipeline.decoding.batching import MaskedSequence
from pipeline.decoding.completing import Completion, fill_sequences
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.likelihood import score_answers
from pipeline.evaluation.options import DRAWS

with extra("eval", "pipeline.evaluation.harness"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

Tokens = list[int]
LENGTH = 256  # default answer length in tokens


@register_model("puma")
class PumaLM(TemplateLM):
    """A run or a checkpoint as a model of the harness."""

    def __init__(
        self,
        checkpoint: str = "",
        weights: str | None = None,
        device: str | None = None,
        batch_size: int | str = 64,
        draws: int = DRAWS,
        check_greedy: bool = True,
        max_batch_size: int | None = None,
        verify: bool = True,
        **sampler: Any,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: run folder, RUN:STEP, or checkpoint folder.
            weights: ema or raw; None = ema if the checkpoint has it.
            device: torch device; by default a GPU if available.
            batch_size: sequences per forward.
            draws: masks per sequence for its likelihood, an even number.
            check_greedy: also decode each scored continuation, because some metrics (accuracy of
                lambada_openai) need to know whether decoding finds it; False saves one forward per token.
            max_batch_size: unused; the harness passes it for its own batch size search.
            verify: compare the hashes of the checkpoint's files.
            sampler: fields of `SamplingSettings`, such as tokens_per_step=4 or seed=1.

        Raises:
            UserError: for a missing checkpoint or a bad setting.
        """
        super().__init__()
        if not checkpoint:
            raise UserError("--model_args names no checkpoint: add checkpoint=RUN, a run folder.")
        known = [field.name for field in dataclasses.fields(SamplingSettings)]
        for name in sampler:
            if name not in known:
                raise UserError(f"--model_args has unknown setting {name}: choose from {known}.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"--batch_size is {batch_size}: give a number of sequences, 1 or more.")
        self.settings = SamplingSettings(**sampler)
        self.settings.check()
        wanted = device or "cuda"  # the harness's default, with or without a GPU
        usable = torch.cuda.is_available() or not wanted.startswith("cuda")
        self._device = torch.device(wanted if usable else "cpu")
        self.loaded = load_model(Path(checkpoint), self._device, weights=weights, verify=verify)  # type: ignore[arg-type]
        self.batch_size, self.draws, self.check_greedy = int(batch_size), draws, check_greedy
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
        """Return the tokens of a text; no special tokens are added."""
        ids: Tokens = self.loaded.tokenizer.encode(string).tolist()
        return ids

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
        scores = score_answers(self.loaded, pairs, self.draws, self.batch_size, self.settings.seed)
        greedy = [False] * len(pairs)
        if self.check_greedy:
            found = self._decode([(context, len(answer)) for context, answer in pairs], self.settings)
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
        scores = score_answers(self.loaded, pairs, self.draws, self.batch_size, self.settings.seed)
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
            found = self._decode([prompts[i] for i in numbers], settings)
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

    def _decode(self, prompts: Sequence[tuple[Tokens, int]], settings: SamplingSettings) -> list[Completion]:
        """Return the continuation of each (prompt, length)."""
        mask = self.loaded.tokenizer.mask
        sequences = [MaskedSequence.behind(ids, [mask] * length) for ids, length in prompts]
        return fill_sequences(self.loaded, sequences, settings, self.batch_size, self.eot_token_id)


def before_first(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first occurrence of any stop string."""
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
