"""Making a tokenizer: SentencePiece trained on a corpus, or a Hugging Face tokenizer.json imported."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import sentencepiece
import tokenizers

from pipeline.base.errors import UserError
from pipeline.base.files import creating_folder, require_new
from pipeline.corpus.records import LONGEST_RECORD
from pipeline.corpus.tokenizer_checks import check_import, keep_apart
from pipeline.data.tokenizer import FORMAT, HUGGING_FACE, Tokenizer, TokenizerFacts, write_tokenizer

MASK = "<mask>"
BYTES_AND_SPECIALS = 256 + 5  # unknown, padding, end, mask, line end
MOST_TOKENS = 2**24  # SentencePiece takes minutes to refuse more
# Characters without a space, after which a line is cut for training. SentencePiece takes such a run as one
# word: of a word of 100,000 characters unigram gets probabilities of 0, and its time grows with the square.
LONGEST_RUN = 2000
# Names of special tokens in Hugging Face files, in order of preference.
USUAL_NAMES = {
    "mask": (MASK, "<|mask|>", "[MASK]", "<|mdm_mask|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eos": (
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|im_end|>",
        "[EOS]",
        "[SEP]",
    ),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
}


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Make the folder completely or not at all; one that cannot be made fails before the work."""
    require_new(output)
    with creating_folder(output, shared=False) as folder:
        yield folder


def import_tokenizer(path: Path, names: dict[str, str | None], output: Path) -> tuple[Tokenizer, list[str]]:
    """Write the folder of a Hugging Face tokenizer.json.

    A mask or padding token that the file lacks gets the next free id: most models have no mask token.

    Args:
        path: the tokenizer.json.
        names: the special tokens by use (mask, pad, eos); None for one of USUAL_NAMES.
        output: the folder; it must not exist.

    Returns:
        The tokenizer, and the added tokens.

    Raises:
        UserError: for a file that `tokenizers` cannot read, a token that it lacks, special tokens that cannot
            be kept apart from text, or characters that vanish.
    """
    with _new_folder(output) as folder:
        content, facts, added = _imported(path, names)
        tokenizer = write_tokenizer(folder, content, facts)
        check_import(tokenizer, path)
        return tokenizer, added


def _imported(path: Path, names: dict[str, str | None]) -> tuple[bytes, TokenizerFacts, list[str]]:
    """Return the content of the model file, its facts, and the added tokens."""
    _check_names(names)
    try:
        found = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        if isinstance(error, OSError):
            raise
        raise UserError(f"--import-json {path} is not a tokenizer.json ({error}): get a new copy.") from None
    ids: dict[str, int] = {}
    added: list[str] = []
    for use, usual in USUAL_NAMES.items():
        given = names.get(use)
        known = [t for t in ([given] if given else usual) if found.token_to_id(t) is not None]
        if not known and use in ("mask", "pad"):
            known = [given or usual[0]]
            added.append(known[0])
        if not known and use == "eos":
            raise UserError(
                f"--import-json {path} has no token {given or ' or '.join(usual)}: name its end-of-sequence "
                "token with --eos-token."
            )
        if known and use != "unk":
            found.add_special_tokens([known[0]])  # even an ordinary token: text must not encode to it
        ids[use] = int(found.get_vocab()[known[0]]) if known else -1
    _check_three(path, ids)
    values = json.loads(found.to_str())
    model = values["model"]
    if model.get("unk_token") is not None or model.get("unk_id") is not None:
        unk = model["unk_id"] if "unk_id" in model else found.token_to_id(model["unk_token"])
        ids["unk"] = ids["unk"] if unk is None else int(unk)
    keep_apart(values, path)
    content = json.dumps(values, ensure_ascii=False).encode()
    facts = TokenizerFacts(
        format=FORMAT,
        model_type=HUGGING_FACE,
        vocab_size=max(found.get_vocab().values()) + 1,
        unk_id=ids["unk"],
        pad_id=ids["pad"],
        eos_id=ids["eos"],
        mask_id=ids["mask"],
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return content, facts, added


def _check_names(names: dict[str, str | None]) -> None:
    for use, name in names.items():
        if name is not None and not name.strip():
            raise UserError(f"--{use}-token is {name!r}: name a token that is more than white space.")


def _check_three(path: Path, ids: dict[str, int]) -> None:
    if len({ids["mask"], ids["pad"], ids["eos"]}) < 3:
        raise UserError(f"{path}: mask, pad and eos must be three tokens, not {ids}.")


def import_sentencepiece(
    path: Path, names: dict[str, str | None], output: Path
) -> tuple[Tokenizer, list[str]]:
    """Write the folder of a SentencePiece model; see `import_tokenizer`.

    Its special tokens become control pieces, which text never gives.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # slow, and rarely needed

    _check_names(names)
    content = ModelProto()
    try:
        content.ParseFromString(path.read_bytes())
        sentencepiece.SentencePieceProcessor(model_proto=content.SerializeToString())
    except Exception as error:  # of protobuf and SentencePiece
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"--import-model {path} is not a SentencePiece model: get a new copy.") from None
    pieces = {piece.piece: number for number, piece in enumerate(content.pieces)}
    ids: dict[str, int] = {}
    added: list[str] = []
    own = {"eos": content.trainer_spec.eos_piece, "pad": content.trainer_spec.pad_piece}
    for use in ("mask", "pad", "eos"):
        given = names.get(use)
        usual = (own.get(use, MASK), *USUAL_NAMES[use])
        usual = tuple(dict.fromkeys(usual))
        known = [name for name in ([given] if given else usual) if name in pieces]
        if not known and use == "eos":
            raise UserError(
                f"--import-model {path} has no piece {given or ' or '.join(usual)}: name its end-of-sequence "
                "piece with --eos-token."
            )
        if not known:
            added.append(given or USUAL_NAMES[use][0])
            pieces[added[-1]] = len(content.pieces)
            content.pieces.add(piece=added[-1], score=0.0)
            known = added[-1:]
        ids[use] = pieces[known[0]]
        content.pieces[ids[use]].type = ModelProto.SentencePiece.CONTROL
    _check_three(path, ids)
    unknown = [n for n, piece in enumerate(content.pieces) if piece.type == ModelProto.SentencePiece.UNKNOWN]
    if not unknown:
        raise UserError(f"{path}: its unknown piece must stay that: name others as mask, pad and eos.")
    model_type = ("unigram", "bpe", "word", "char")[content.trainer_spec.model_type - 1]
    serialized = content.SerializeToString(deterministic=True)
    with _new_folder(output) as folder:
        facts = TokenizerFacts(
            format=FORMAT,
            model_type=model_type,
            vocab_size=len(content.pieces),
            unk_id=unknown[0],
            pad_id=ids["pad"],
            eos_id=ids["eos"],
            mask_id=ids["mask"],
            sha256=hashlib.sha256(serialized).hexdigest(),
        )
        tokenizer = write_tokenizer(folder, serialized, facts)
        check_import(tokenizer, path)
        return tokenizer, added


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_type: str, output: Path) -> Tokenizer:
    """Train a SentencePiece model and write its folder.

    The text is not normalized: no dummy prefix, whitespace as it is. unigram and bpe fall back to bytes, so
    decoding restores any text; char and word map what they have not seen to the unknown token. The same texts
    give the same bytes.

    Args:
        texts: the corpus.
        vocab_size: tokens, special ones included; char and word may have fewer.
        model_type: one of MODEL_TYPES.
        output: the folder; it must not exist.

    Raises:
        UserError: if the corpus is empty or does not fit the vocabulary size.
    """
    with _new_folder(output) as folder:
        content = _trained(texts, vocab_size, model_type)
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
        return write_tokenizer(folder, content, facts)


_RUN = re.compile(rf"[^ ]{{{LONGEST_RUN}}}(?=[^ ])")


def _cut_runs(line: str) -> Iterator[str]:
    """Yield a line cut in its runs of more than LONGEST_RUN characters without a space."""
    start = 0
    for match in _RUN.finditer(line) if len(line) > LONGEST_RUN else ():
        yield line[start : match.end()]
        start = match.end()
    yield line[start:]


def _trained(texts: Iterable[str], vocab_size: int, model_type: str) -> bytes:
    """Return a trained model; see `train_tokenizer`."""
    falls_back = model_type in ("unigram", "bpe")
    if falls_back and vocab_size <= BYTES_AND_SPECIALS:
        raise UserError(
            f"--vocab-size {vocab_size} does not work for --model-type {model_type}: give more than the "
            f"{BYTES_AND_SPECIALS} bytes and special tokens."
        )
    if vocab_size > MOST_TOKENS:
        raise UserError(f"--vocab-size {vocab_size} does not work: give at most {MOST_TOKENS}.")
    model = io.BytesIO()
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError("--input has no text in it: give another corpus.")
    raised: list[BaseException] = []
    seen: list[bool] = []

    def lines() -> Iterator[str]:
        try:
            for text in chain([first], texts):
                for line in filter(None, text.split("\n")):
                    seen[:] = [True]
                    yield from _cut_runs(line)
        except BaseException as error:  # SentencePiece would turn it into a RuntimeError
            raised.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=falls_back,
            character_coverage=0.9995 if falls_back else 1.0,
            byte_fallback=falls_back,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # the indentation of code: one token, not one a space
            unk_id=0,
            pad_id=1,
            eos_id=2,
            bos_id=-1,
            control_symbols=[MASK],
            max_sentence_length=LONGEST_RECORD,  # longer lines are skipped silently; the default is 4,192
            # The trainer sees single lines: without this a line end would be unknown.
            user_defined_symbols=["\n"],
            num_threads=1,  # the order of floating-point sums, and so the model, depends on the threads
            minloglevel=2,
        )
    except RuntimeError as error:
        if raised:
            raise raised[0] from None
        if not seen:
            raise UserError("--input has no text in it but line ends: give another corpus.") from None
        reason = str(error).rsplit("] ", 1)[-1].split(" Increase ")[0].strip(" .")
        reason = reason or f"SentencePiece says {str(error).strip()!r}; more text or fewer tokens may help"
        raise UserError(
            f"--vocab-size {vocab_size} does not work for --model-type {model_type} on this text: {reason}."
        ) from None
    return model.getvalue()
