"""Quality of sampled text: generative perplexity, with the variety that a low perplexity may have cost.

Samples are scored by a causal model (MDLM, arXiv 2406.07524, and SEDD, arXiv 2310.16834, take GPT-2 large).
Repetitive text has a low perplexity (arXiv 2409.02908). Therefore entropy and distinct n-grams stand beside
it, and the same figures of the true texts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.cli import option
from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import MaskedSequence, check_beginnings, up_to_end
from pipeline.decoding.completing import fill_sequences
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.intervals import ratio_interval
from pipeline.evaluation.measures import Measure
from pipeline.evaluation.pairs import read_documents
from pipeline.evaluation.results import Row
from pipeline.evaluation.scorers import Scorer, TextScore, common_length, score_texts

NGRAMS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """What one sample is compared with.

    Attributes:
        prompt: token ids that the model is given; may be empty.
        truth: token ids of the true text behind it, cut to the length of a sample.
        length: tokens of a sample, at most.
    """

    prompt: list[int]
    truth: list[int]
    length: int


def read_excerpts(
    path: Path,
    keys: tuple[str, ...],
    tokenizer: Tokenizer,
    room: int,
    prefix_length: int,
    length: int | None,
    limit: int | None,
    called: Callable[[str], str] = option,
) -> list[Excerpt]:
    """Return an excerpt of each document that leaves room for a sample and has a true text.

    Args:
        path: PREFIX of an indexed dataset, or a file of records.
        keys: see `read_documents`.
        tokenizer: of the model.
        room: the sequence length that the model is trained with.
        prefix_length: tokens of a text that are the prompt; a pair has a prompt.
        length: tokens of a sample; None = all that fit.
        limit: maximum number of documents to read; None = all.
        called: the name of a setting in a message; by default its command-line option.

    Raises:
        UserError: see `read_pairs`.
    """
    found, prefix = [], called("prefix_length")
    for parts in read_documents(path, keys, tokenizer, limit):
        if len(parts) == 2 and prefix_length:
            raise UserError(
                f"{prefix} is {prefix_length}, but {path} holds pairs, whose prompts are given: leave it out."
            )
        whole = [token for part in parts for token in part]
        cut = len(parts[0]) if len(parts) == 2 else prefix_length
        size = min(room - cut, length or room)
        truth = up_to_end(tokenizer, whole[cut:])[: max(size, 0)]
        if tokenizer.decode(truth):
            found.append(Excerpt(whole[:cut], truth, size))
    if not found:
        raise UserError(
            f"{called('data')} {path} holds no document with text behind its prompt and within {room} "
            f"tokens, the trained sequence length: give another file, or a shorter {prefix}."
        )
    return found


@dataclasses.dataclass(frozen=True)
class GenerativePerplexity(Measure):
    """Samples and true texts, scored by a causal model.

    Attributes:
        excerpts: one a sample.
        scorer: scores the texts.
        settings: settings of the sampler.
    """

    excerpts: Sequence[Excerpt]
    scorer: Scorer
    settings: SamplingSettings

    def __len__(self) -> int:
        return len(self.excerpts)

    def check(self, tokenizer: Tokenizer, config: Config) -> None:
        """Raise a `UserError` if the samples would be alike, or the model cannot begin them."""
        if self.settings.temperature == 0 and not all(excerpt.prompt for excerpt in self.excerpts):
            raise UserError(
                "--temperature is 0: all samples without a prompt would be the same text; give "
                "--temperature 1, or prompts by --prefix-length."
            )
        check_beginnings(to_be_written(self.excerpts, tokenizer), config)

    def rows(self, loaded: Loaded, numbers: Sequence[int], batch_size: int) -> list[Row]:
        tokenizer = loaded.tokenizer
        asked = to_be_written([self.excerpts[number] for number in numbers], tokenizer)
        found = fill_sequences(loaded, asked, self.settings, batch_size, tokenizer.eos, numbers=numbers)
        return self.scored(numbers, [(one.tokens, one.steps) for one in found], tokenizer)

    def scored(
        self, numbers: Sequence[int], samples: Sequence[tuple[list[int], int]], tokenizer: Tokenizer
    ) -> list[Row]:
        """Return the rows of the items `numbers`, from the tokens and the forwards of each one's sample."""
        excerpts = [self.excerpts[number] for number in numbers]
        pairs = [(one.prompt, tokens) for one, (tokens, _) in zip(excerpts, samples, strict=True)]
        pairs += [(one.prompt, one.truth) for one in excerpts]
        texts = [text_behind(tokenizer, *pair) for pair in pairs]
        scores = [self._row(*one) for one in zip(texts, score_texts(self.scorer, texts), strict=True)]
        count = len(numbers)
        return [
            {
                "item": number,
                "prompt": texts[i][0],
                "sample": scores[i],
                "reference": scores[count + i],
                "tokens": len(tokens),
                "steps": steps,
            }
            for i, (number, (tokens, steps)) in enumerate(zip(numbers, samples, strict=True))
        ]

    def _row(self, text: tuple[str, str], score: TextScore) -> Row:
        return {
            "text": text[1],
            "nll": score.nll,
            "tokens": len(score.ids),
            "bytes": score.bytes,
            "entropy": entropy(score.ids),
            "unknown": score.ids.count(-1 if self.scorer.unknown is None else self.scorer.unknown),
        }

    def figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        return self._figures([row["sample"] for row in rows]) | {
            "reference": self._figures([row["reference"] for row in rows]),
            "tokens_per_forward": sum(row["tokens"] for row in rows) / sum(row["steps"] for row in rows),
        }

    def _figures(self, texts: Sequence[Row]) -> dict[str, Any]:
        """Return the figures of texts, without the empty ones; None where nothing is defined."""
        full = [text for text in texts if text["tokens"]]
        nll, tokens, size = ([text[name] for text in full] for name in ("nll", "tokens", "bytes"))
        found: dict[str, Any] = {"samples": len(texts), "empty": len(texts) - len(full)}
        bits = [nats / math.log(2) for nats in nll]
        for name, above, below, form in (
            ("perplexity", nll, tokens, math.exp),
            ("bits_per_byte", bits, size, float),
        ):
            ends = ratio_interval(above, below)
            found[name] = form(sum(above) / sum(below)) if full else None
            found[f"{name}_interval"] = ends and tuple(map(form, ends))
        ids = [self.scorer.encode(text["text"]) for text in full]
        return found | {
            "entropy": sum(text["entropy"] for text in full) / len(full) if full else None,
            **{f"distinct_{n}": distinct(ids, n) for n in NGRAMS},
            "tokens_per_text": sum(tokens) / len(full) if full else None,
            "unknown": sum(text["unknown"] for text in full),
        }

    def summary(self, figures: dict[str, Any]) -> str:
        lines = [_line(kind, of) for kind, of in (("samples", figures), ("true texts", figures["reference"]))]
        if figures["empty"]:
            lines.insert(0, f"{figures['empty']} of {figures['samples']} samples are empty: not scored")
        for kind, of in (("samples", figures), ("true texts", figures["reference"])):
            if of["unknown"]:
                lines.append(f"the scorer's tokenizer does not know {of['unknown']} tokens of the {kind}")
        return "\n".join(lines)


def to_be_written(excerpts: Sequence[Excerpt], tokenizer: Tokenizer) -> list[MaskedSequence]:
    """Return each prompt with a masked sample behind it."""
    return [MaskedSequence.behind(one.prompt, [tokenizer.mask] * one.length) for one in excerpts]


def text_behind(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> tuple[str, str]:
    """Return the text of a prompt, and that of the tokens behind it.

    Both are decoded together. Alone, tokens may lose a space, and the bytes of a character are torn apart.
    """
    whole = tokenizer.decode([*prompt, *tokens])
    cut = common_length(tokenizer.decode(prompt), whole)
    return whole[:cut], whole[cut:]


def entropy(ids: Sequence[int]) -> float:
    """Return the entropy of the unigrams of a text, in nats; at most log(len(ids))."""
    return sum(n / len(ids) * math.log(len(ids) / n) for n in Counter(ids).values())


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Return the share of distinct n-grams among those of all texts (Li et al., arXiv 1510.03055)."""
    counts = Counter(
        itertools.chain.from_iterable(zip(*(ids[i:] for i in range(n)), strict=False) for ids in texts)
    )
    return len(counts) / counts.total() if counts else None


def _line(kind: str, figures: dict[str, Any]) -> str:
    form = {name: f"{value:.3f}" if isinstance(value, float) else "?" for name, value in figures.items()}
    ends = figures["perplexity_interval"]
    within = f", 95% interval {ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
    shares = " ".join(form[f"distinct_{n}"] for n in NGRAMS)
    return (
        f"{kind}: perplexity {form['perplexity']}{within}, {form['bits_per_byte']} bits per byte, "
        f"unigram entropy {form['entropy']} nats, distinct 1-, 2-, 3-grams {shares}, "
        f"{form['tokens_per_text']} tokens a text"
    )
