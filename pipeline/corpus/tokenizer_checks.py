"""An imported tokenizer: special tokens are kept apart from text, losses are found by a round trip."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from pipeline.base.errors import UserError
from pipeline.data.tokenizer import SPACE, HuggingFaceModel, Tokenizer

_SHOWN = 20  # characters that are lost, in the message
# One character for every lead byte of UTF-8; U+0080 to U+00BF have all its continuation bytes.
_LEADS = (
    *range(0xC0, 0x800, 0x40),
    0x900,
    *range(0x1000, 0x10000, 0x1000),
    0x10400,
    *range(0x40000, 0x110000, 0x40000),
)
_BYTES = "".join(map(chr, (*range(0xC0), *_LEADS)))
PROBES = {
    "bytes": _BYTES,
    "capital letters": "The QUICK Fox",
    "digits and marks": "x=3.14, (a+b)*2 != [1] {#} ~ `$` ^ | \\ \"'s don't @ 50% & _",
    "Latin letters": "naïve café Ångström straße œuvre Łódź ğ",
    "combining marks": "e\u0301 a\u0308 o\u0302\u0323",
    "Greek": "αβγ Ωμέγα",
    "Cyrillic": "Привет, мир",
    "Hebrew": "שלום עולם",
    "Arabic": "مرحبا بالعالم",
    "Devanagari": "नमस्ते दुनिया",
    "Thai": "สวัสดีชาวโลก",
    "Chinese": "今天天气很好，我们去公园。",
    "Japanese": "こんにちは、カタカナ",
    "Korean": "안녕하세요 세계",
    "emoji": "🎉👩\u200d💻🇩🇪",
    "mathematics": "∀x∈ℝ: √x ≤ ½ ﬁ x² Å",
    "full-width characters": "ＡＢＣ１２３",
    "a space in front": " a",
    "a space at the end": "a ",
    "a space before a mark": "a , b . c ' s !",
    "runs of spaces": "a  b    c",
    "tabs": "a\tb\t\tc",
    "line ends": "a\nb\n\nc\n",
    "CR LF": "a\r\nb\r\n",
    "other white space": "a\u00a0b\u2003c\u3000d\u2028e\u0085f",
    "U+2581": "a\u2581b",
}


def keep_apart(content: dict[str, Any], path: object) -> None:
    """Change a tokenizer.json so that no text gives its special tokens.

    `tokenizers` can leave special tokens in a text alone, but then the text goes to the model, which may find
    them as ordinary pieces. A last step before the model takes them apart behind their first character.

    Raises:
        UserError: for a special token of one character, which cannot be taken apart.
    """
    specials = [token["content"] for token in content["added_tokens"] if token["special"]]
    found = sorted(_reachable(content["model"], specials), key=len, reverse=True)
    for name in found:
        if len(name) == 1:
            raise UserError(
                f"{path}: its special token {name!r} is an ordinary character of its "
                "model, so text would become it: name others by --mask-token, --pad-token, --eos-token."
            )
    if not found:
        return
    pattern = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in found)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before = content["pre_tokenizer"]
    steps = before["pretokenizers"] if before and before["type"] == "Sequence" else [before] if before else []
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, split]}


def _reachable(model: dict[str, Any], names: Iterable[str]) -> set[str]:
    """Return which names the model of a tokenizer.json can find in a text."""
    vocabulary = model["vocab"]
    known = {entry[0] for entry in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    found = known & set(names)
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return found
    merged = {"".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]}
    return {name for name in found if name in merged or len(name) == 1}


def check_import(tokenizer: Tokenizer, path: object) -> list[str]:
    """Return what a tokenizer changes, in words; refuse one that loses text in silence.

    Raises:
        UserError: if characters vanish without an unknown token, or text becomes a special token.
    """
    specials = {tokenizer.mask, tokenizer.pad, tokenizer.eos}
    for name in tokenizer.model.specials():
        for text in (name, f" {name}", f"a{name}b", f"a {name} b", name * 2):
            if specials & set(tokenizer.encode(text).tolist()):
                raise UserError(f"{path}: text {text!r} becomes a special token: name other ones.")
    if vanished := _vanished(tokenizer):
        raise UserError(
            f"{path} loses {len(vanished)} of the characters tried, without an unknown token: "
            f"{''.join(vanished)[:_SHOWN]!r}. Give it an unknown token, or train it with all 256 bytes "
            "(initial_alphabet=ByteLevel.alphabet())."
        )
    return _changes(tokenizer)


def _changes(tokenizer: Tokenizer) -> list[str]:
    """Return in words what becomes of the probes that do not come back."""
    unknown, changed = [], []
    for name, text in PROBES.items():
        ids = tokenizer.encode(text).tolist()
        back = tokenizer.decode(ids)
        if back == text:
            continue
        if tokenizer.unk in ids:
            unknown.append(name)
        else:
            changed.append(f"{name} ({text[-_SHOWN:]!r} becomes {back[-_SHOWN:]!r})")
    return ([f"unknown characters in: {', '.join(unknown)}"] if unknown else []) + changed


def _vanished(tokenizer: Tokenizer) -> list[str]:
    """Return the characters that a model of `tokenizers` drops; not those that its normalizer removes."""
    model = tokenizer.model
    if not isinstance(model, HuggingFaceModel):
        return []  # SentencePiece has bytes or the unknown token for them
    normalizer: tokenizers.normalizers.Normalizer | None = model.tokenizer.normalizer
    is_bytes = "ByteLevel" in model.tokenizer.to_str()  # else a step before the model may drop white space
    added = set(model.tokenizer.get_added_tokens_decoder())  # the decoder may not write these as they are
    found = []
    tried = dict.fromkeys("".join(PROBES.values()))
    tried.pop(SPACE)  # preprocessing counts it
    for character in tried:
        kept = normalizer.normalize_str(character) if normalizer is not None else character
        if character not in kept or (character.isspace() and not is_bytes):
            continue
        ids = tokenizer.encode(character).tolist()
        if added.isdisjoint(ids) and tokenizer.unk not in ids and character not in tokenizer.decode(ids):
            found.append(character)
    return found
