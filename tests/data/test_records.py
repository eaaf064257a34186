"""Records: every document once, whatever the cuts; what cannot be used is named with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import UserError
from pipeline.data.records import Keys, Unit, check_inputs, cut, read, read_all

TEXT = Keys(("text",))
LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=12)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=LINES, target=st.integers(1, 60), ascii_only=st.booleans(), last_line_end=st.booleans())
def test_jsonl_is_cut_without_loss(
    tmp_path: Path, texts: list[str], target: int, ascii_only: bool, last_line_end: bool
) -> None:
    """Units cover the file; each document is in exactly one, in order; U+2028 and the like end no line."""
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes(("\n".join(lines) + ("\n" if last_line_end and lines else "")).encode())
    units = cut(path, target)
    assert [unit.start for unit in units[1:]] == [unit.end for unit in units[:-1]]
    assert sum(unit.end - unit.start for unit in units) == path.stat().st_size
    assert [record.texts[0] for unit in units for record in read(unit, TEXT)] == texts


PARAGRAPH = st.text(st.sampled_from("ab é\t"), min_size=1).map(lambda t: t + "x")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paragraphs=st.lists(st.lists(PARAGRAPH, min_size=1, max_size=3), max_size=8),
    blanks=st.lists(st.sampled_from(["\n", "\n\n", " \n\n", "\r\n"]), min_size=8, max_size=8),
    target=st.integers(1, 40),
)
def test_txt_is_cut_at_blank_lines(
    tmp_path: Path, paragraphs: list[list[str]], blanks: list[str], target: int
) -> None:
    """Each run of lines between blank lines is a document, verbatim, in exactly one unit."""
    path = tmp_path / "x.txt"
    content = "".join("\n".join(lines) + "\n" + blanks[i] for i, lines in enumerate(paragraphs))
    path.write_bytes(content.encode())
    found = [record.texts[0] for unit in cut(path, target) for record in read(unit, TEXT)]
    assert found == ["\n".join(lines) for lines in paragraphs]


def test_pairs_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "1+1", "a": "2"}\n\n{"a": "4", "q": "2+2"}\n')
    records = list(read_all([path], Keys(("q", "a"))))
    assert [record.texts for record in records] == [("1+1", "2"), ("2+2", "4")]
    assert records[1].place == f"{path}, line 3"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"text": "fine"}\n{"text": \n', ["line 2", "not valid JSON"]),
        (b'{"text": "fine"}\n{"txt": "x"}\n', ["line 2", "no key 'text'", "'txt'", "--text-key"]),
        (b'{"text": 7}\n', ["line 1", "'text' is of type int"]),
        (b'{"text": ""}\n', ["line 1", "an empty text"]),
        (b'["text"]\n', ["line 1", "no JSON object"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2", "not valid UTF-8"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read(Unit(path, 0, len(content)), TEXT))
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_an_empty_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "", "a": "fine"}\n{"q": "x", "a": ""}\n')
    with pytest.raises(UserError, match="line 2 has an answer of length 0"):
        list(read_all([path], Keys(("q", "a"))))


def test_inputs_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        check_inputs([tmp_path / "nowhere.jsonl"], TEXT)
    for name in ("x.txt", "x.pdf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"x.pdf: its kind is not known; use .jsonl"):
        check_inputs([tmp_path / "x.pdf"], TEXT)
    with pytest.raises(UserError, match="pairs come from jsonl"):
        check_inputs([tmp_path / "x.txt"], Keys(("q", "a")))
