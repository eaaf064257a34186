"""Chat messages as prompts and answers, written by a chat template of transformers.

A chat template is a Jinja text. Here it gives what `apply_chat_template` of transformers gives, in the same
sandbox, with one difference: special tokens count only where the template itself wrote them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pipeline.base.errors import UserError
from pipeline.corpus.chat import Message, Written, answers_in
from pipeline.corpus.reading import BadRecord
from pipeline.data.tokenizer import TEMPLATE_FILE

SETTINGS_FILE = "tokenizer_config.json"
# Unicode promises that these are no characters. Between the first two stands what {% generation %} marks; the
# third takes apart what looks like a special token in a message.
_OPEN, _CLOSE, _TORN = "\ufdd0", "\ufdd1", "\ufdd2"
_MARK = re.compile(f"[{_OPEN}{_CLOSE}{_TORN}]")


def pairs_by_template(
    messages: Sequence[Message], template: str, every_turn: bool, specials: Sequence[str]
) -> list[tuple[str, str]]:
    """Return (prompt, answer) of the last turn, or of every turn of the assistant.

    The prompt is all that the template writes before the answer, also the opening of the assistant's turn.
    The answer is what the template marks by {% generation %}, or else all that follows the prompt. White
    space behind a special token at its end is left out.

    Args:
        messages: each with a role.
        template: from `read_template`.
        every_turn: each turn of the assistant is an answer, given what came before it.
        specials: the names of the tokenizer's special tokens.

    Raises:
        BadRecord: for messages that the template refuses, or a chat without an answer.
    """
    if _MARK.search(json.dumps(messages, ensure_ascii=False)):
        raise BadRecord("chat_template", "a message holds U+FDD0, U+FDD1 or U+FDD2, which are no characters")
    torn = [_taken_apart(message, tuple(specials)) for message in messages]
    found: list[tuple[str, str]] = []
    for place in answers_in(messages, every_turn):
        whole = _render(template, torn[: place + 1])
        start, end = whole.rfind(_OPEN), whole.rfind(_CLOSE)
        if start < 0:
            prompt = _render(template, torn[:place], add_generation_prompt=True)
            start, end = len(prompt), len(whole)
            if not whole.startswith(prompt):
                raise BadRecord(
                    "chat_template",
                    "with its answer the template writes another prompt than without: mark answers in the "
                    "template by {% generation %} and {% endgeneration %}",
                )
        answer = whole[start:end]
        if answer.rstrip().endswith(tuple(specials)):
            answer = answer.rstrip()
        found.append((_written(whole[:start]), _written(answer)))
    return found


def _render(template: str, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return what a template writes, with marks around what it marks by {% generation %}."""
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None
        )
    except Exception as error:  # a template may fail in any way that a program can
        raise BadRecord("chat_template", f"the chat template refuses the messages ({error})") from None


def asked(template: str, text: str, specials: Sequence[str]) -> Written:
    """Return a text as the message of a user, with the opening of the assistant's turn.

    The arguments are those of `pairs_by_template`.

    Raises:
        UserError: if the template refuses it.
    """
    message = {"role": "user", "content": _MARK.sub("", text)}
    try:
        return _written(_render(template, [_taken_apart(message, tuple(specials))], True))
    except BadRecord as bad:
        raise UserError(f"{bad.detail}: give another --chat-template.") from None


def rendered(template: str, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """Return what a template writes; raise a `BadRecord` if it refuses the messages."""
    return str(_written(_render(template, messages, add_generation_prompt)))


def _written(text: str) -> Written:
    """Return a rendered text without its marks; no special token spans a mark."""
    return Written.apart(_MARK.split(text))


@functools.lru_cache(maxsize=2)
def _pattern(specials: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def _taken_apart(value: Any, specials: tuple[str, ...]) -> Any:
    """Return a message in which no special token is whole: a mark stands between its characters."""
    if isinstance(value, str):
        return _pattern(specials).sub(lambda match: _TORN.join(match.group()), value)
    if isinstance(value, dict):
        return {name: _taken_apart(part, specials) for name, part in value.items()}
    if isinstance(value, list):
        return [_taken_apart(part, specials) for part in value]
    return value


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} of transformers, around what the assistant generates."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


@functools.lru_cache(maxsize=2)
def _compiled(template: str) -> jinja2.Template:
    """Return a template in the environment of transformers, without strftime_now: no date in the tokens."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **more)

    extensions = [_Generation, jinja2.ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def read_template(path: Path) -> str:
    """Return a chat template that sets the special tokens it uses.

    Args:
        path: a folder of a tokenizer of transformers, its tokenizer_config.json, or a Jinja file. The special
            tokens come from the tokenizer_config.json there.

    Raises:
        UserError: if there is no template, it is no valid Jinja, or a token that it uses has no name.
    """
    folder = path if path.is_dir() else path.parent
    settings = _settings(folder / SETTINGS_FILE)
    if path.is_file() and path.name != SETTINGS_FILE:
        template = path.read_text(encoding="utf-8")
    elif path.is_dir() and (path / TEMPLATE_FILE).is_file():
        template = (path / TEMPLATE_FILE).read_text(encoding="utf-8")
    else:
        found = settings.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {one["name"]: one["template"] for one in found}.get("default")
        if not isinstance(found, str):
            raise UserError(
                f"--chat-template {path} holds no chat template: give a Jinja file, or a folder with "
                f"{TEMPLATE_FILE} or a {SETTINGS_FILE} that has one."
            )
        template = found
    for name in ("eos_token", "bos_token"):
        if not re.search(rf"\b{name}\b", template) or re.search(rf"\bset\s+{name}\b", template):
            continue
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            raise UserError(
                f"--chat-template {path} uses {name}, which {folder / SETTINGS_FILE} does not name: name it "
                f"there, or write {{%- set {name} = '...' -%}} at the beginning of the template."
            )
        template = f"{{%- set {name} = {json.dumps(token)} -%}}{template}"
    try:
        _compiled(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--chat-template {path}, line {error.lineno}: {error.message}: correct the template."
        ) from None
    return template


def _settings(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}): get a complete copy of it.") from None
