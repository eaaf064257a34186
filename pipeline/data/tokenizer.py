"""SentencePiece tokenizers: a folder with the model and a small JSON of special ids."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from pipeline.cli import UserError
from pipeline.data.batch import Array

MODEL_TYPES = ("unigram", "bpe", "char", "word")
MODEL_FILE, FACTS_FILE = "tokenizer.model", "tokenizer.json"
FORMAT = 1
MASK = "<mask>"


@dataclass
class TokenizerFacts:
    """What tokenizer.json holds: the special ids, and the identity of the model file."""

    format: int
    model_type: str
    vocab_size: int
    unk_id: int
    pad_id: int
    eos_id: int
    mask_id: int
    sha256: str


class Tokenizer:
    """Text to token ids and back; also what megatron-core's datasets ask of a tokenizer.

    Attributes:
        vocab_size: tokens, special ones included.
        unk, pad, eos, mask: special ids; no text ever encodes to pad, eos or mask.
        sha256: identity of the model, hexadecimal.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, facts: TokenizerFacts) -> None:
        """Wrap a loaded model; see `load`."""
        self.processor = processor
        self.vocab_size = facts.vocab_size
        self.unk, self.pad, self.eos, self.mask = facts.unk_id, facts.pad_id, facts.eos_id, facts.mask_id
        self.eod = self.eos  # megatron-core's name
        self.sha256 = facts.sha256
        self.unique_identifiers = OrderedDict(class_name=type(self).__name__, sha256=facts.sha256)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Return the tokenizer of a folder; raise a `UserError` when it is missing or damaged."""
        model, facts_path = folder / MODEL_FILE, folder / FACTS_FILE
        for path in (model, facts_path):
            if not path.is_file():
                raise UserError(
                    f"tokenizer {folder}: {path} is missing; make one with tools/train_tokenizer.py."
                )
        content = model.read_bytes()
        try:
            facts = TokenizerFacts(**json.loads(facts_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{facts_path} is damaged ({error}): train the tokenizer again.") from None
        if hashlib.sha256(content).hexdigest() != facts.sha256:
            raise UserError(
                f"{model} is not the file that {facts_path} describes: train the tokenizer again."
            )
        return cls(sentencepiece.SentencePieceProcessor(model_proto=content), facts)

    def encode(self, text: str) -> Array:
        """Return the token ids [n] int32 of a text."""
        ids: Array = self.processor.encode(text, out_type="numpy")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Return the token ids of each text; without a Python list of numbers in between."""
        ids: list[Array] = self.processor.encode(list(texts), out_type="numpy", num_threads=1)
        return ids

    def decode(self, ids: Iterable[int], mask_text: str = "") -> str:
        """Return the text of token ids; pad and eos are left out, mask tokens shown as `mask_text`."""
        text: list[str] = []
        run: list[int] = []
        for token in (int(i) for i in ids):
            if token == self.mask:
                text.append(self.processor.decode(run) + mask_text)
                run = []
            elif token not in (self.pad, self.eos):
                run.append(token)
        return "".join([*text, self.processor.decode(run)])


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_type: str, output: Path) -> Tokenizer:
    """Train a SentencePiece model and write its folder, whole or not at all.

    Nothing of the text is changed on the way: no normalisation, no dummy prefix, whitespace as it is. unigram
    and bpe fall back to bytes, so that decoding gives back any text; char and word map what they have not
    seen to the unknown token. The same texts give the same bytes.

    Args:
        texts: the corpus.
        vocab_size: tokens, special ones included; char and word may have fewer.
        model_type: one of MODEL_TYPES.
        output: the folder; it must not exist.

    Raises:
        UserError: when the corpus is empty or does not fit the vocabulary size.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or name another folder.")
    falls_back = model_type in ("unigram", "bpe")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in texts for part in text.split("\n") if part),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=falls_back,
            character_coverage=0.9995 if falls_back else 1.0,
            byte_fallback=falls_back,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            pad_id=1,
            eos_id=2,
            bos_id=-1,
            control_symbols=[MASK],
            # The trainer sees single lines, so a line end would otherwise be unknown to it.
            user_defined_symbols=["\n"],
            num_threads=1,  # the order of its floating-point sums, and so the model, depends on the threads
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase ")[0].strip(" .") or "no reason given"
        raise UserError(
            f"--vocab-size {vocab_size} cannot be had for --model-type {model_type} from this text: {reason}."
        ) from None
    content = model.getvalue()
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    facts = TokenizerFacts(
        format=FORMAT,
        model_type=model_type,
        vocab_size=processor.vocab_size(),
        unk_id=processor.unk_id(),
        pad_id=processor.pad_id(),
        eos_id=processor.eos_id(),
        mask_id=processor.piece_to_id(MASK),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    writing = output.with_name(f".{output.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    (writing / MODEL_FILE).write_bytes(content)
    (writing / FACTS_FILE).write_text(
        json.dumps(dataclasses.asdict(facts), indent=2) + "\n", encoding="utf-8"
    )
    writing.rename(output)
    return Tokenizer(processor, facts)
