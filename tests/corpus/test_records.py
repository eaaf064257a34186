"""Records: every document once, whatever the cuts; keys, chat and sentences; what cannot be used is named."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.corpus import records
from pipeline.corpus.reading import BadRecord, Span, SpanReader, cut
from pipeline.corpus.records import Keys, check_inputs, documents, read_all, sentences
from pipeline.corpus.sources import Source, find

TEXT = Keys(("text",))
LINES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=12)


def read_cut(path: Path, target: int, keys: Keys = TEXT) -> list[str]:
    """Return the texts of a file that is read in spans of about `target` bytes."""
    source = Source.of_file(path)
    found = []
    for span in cut(0, source, lambda: target, keys.reading().unit):
        for _, content in SpanReader(source, span, keys.reading()):
            if content and not (isinstance(content, bytes) and content.isspace()):
                found += [texts[0] for texts in documents(content, keys, source.format == "text")]
    return found


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=LINES, target=st.integers(1, 60), ascii_only=st.booleans(), last_line_end=st.booleans())
def test_jsonl_is_cut_without_loss(
    tmp_path: Path, texts: list[str], target: int, ascii_only: bool, last_line_end: bool
) -> None:
    """Spans cover the file; each document is in exactly one, in order; U+2028 and the like end no line."""
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    path.write_bytes(("\n".join(lines) + ("\n" if last_line_end and lines else "")).encode())
    spans = list(cut(0, Source.of_file(path), lambda: target, "paragraph"))
    assert [span.start for span in spans[1:]] == [span.end for span in spans[:-1]]
    assert sum(span.end - span.start for span in spans) == path.stat().st_size
    assert read_cut(path, target) == texts


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
    """Each run of lines between blank lines is a document, verbatim, in exactly one span; or each line is."""
    path = tmp_path / "x.txt"
    content = "".join("\n".join(lines) + "\n" + blanks[i] for i, lines in enumerate(paragraphs))
    path.write_bytes(content.encode())
    assert read_cut(path, target) == ["\n".join(lines) for lines in paragraphs]
    by_line = read_cut(path, target, Keys(("text",), split="line"))
    assert by_line == [line for lines in paragraphs for line in lines]


def test_pairs_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "1+1", "a": "2"}\n\n{"a": "4", "q": "2+2"}\n')
    found = list(read_all([path], Keys(("q", "a"))))
    assert [record.texts for record in found] == [("1+1", "2"), ("2+2", "4")]
    assert found[1].place == f"{path}, line 3"


def test_tables_are_read_whole(tmp_path: Path) -> None:
    """Of any number of row groups; also by the tools that read no plan."""
    texts = [str(number) for number in range(95)]
    for rows in (10, 1000):
        path = tmp_path / f"{rows}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=rows)
        assert [record.texts for record in read_all([path], TEXT)] == [(text,) for text in texts]
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": [*texts, ""]}), bad, row_group_size=10)
    with pytest.raises(UserError, match=r"bad.parquet, row 96: a text of length 0"):
        list(read_all([bad], TEXT))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), bad)
    assert list(read_all([bad], TEXT)) == []


def test_an_excerpt_is_spread_over_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much text as asked for, of every file its share, and of every part of a plain file; or all of it."""
    monkeypatch.setattr(records, "SMALLEST_EXCERPT", 500)
    numbers = range(4000)
    lines = [json.dumps({"text": f"{number:05d}"}) + "\n" for number in numbers]
    (tmp_path / "a.jsonl").write_text("".join(lines[:2000]))
    for number in numbers[2000:3000]:
        (tmp_path / f"b{number}.jsonl").write_text(lines[number])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines[3000:]).encode(), compresslevel=0))
    sources = check_inputs(sorted(tmp_path.iterdir()), TEXT)
    places: list[float] = []

    bad = records.BadRecords()

    def excerpt(limit: float) -> list[int]:
        places.clear()
        found = records.read_excerpt(sources, TEXT, limit, lambda behind, text: places.append(behind), bad)
        return [int(record.texts[0]) for record in found]

    assert excerpt(5 * 4000) == list(numbers)
    found = excerpt(5 * 400)
    assert abs(len(found) - 400) <= 1
    assert found == excerpt(5 * 400)
    assert sorted(set(found)) == found
    total = sum(source.size for source in sources)
    assert places == sorted(places)
    assert 0.75 * total < places[-1] <= total
    for first in range(0, 3000, 250):  # a tenth of each part
        assert abs(sum(first <= number < first + 250 for number in found) - 25) <= 3
    assert abs(sum(number >= 3000 for number in found) - 100) <= 3


def test_an_excerpt_leaves_out_few_bad_records(tmp_path: Path) -> None:
    """Up to 1%: one bad line of a large corpus is no reason to have no tokenizer; a wrong key is."""
    good, path = [f'{{"text": "{n}"}}\n' for n in range(2970)], tmp_path / "x.jsonl"

    def excerpt(lines: list[str]) -> tuple[int, int]:
        path.write_text("".join(lines))
        bad = records.BadRecords()
        found = records.read_excerpt(check_inputs([path], TEXT), TEXT, 1e6, lambda behind, text: None, bad)
        return len(list(found)), bad.count

    assert excerpt([*good, *["bad\n"] * 30]) == (2970, 30)
    assert excerpt([*["bad\n"] * 9, *good, "bad\n"]) == (2970, 10)
    for lines, first in (
        ([*good, *["bad\n"] * 31], 2971),  # found at the end
        ([*good[:5], *["bad\n"] * 11, *good[:989], '{"txt": 3}\n', *good], 6),  # after 1,000 records
        (["bad\n"], 1),
    ):
        with pytest.raises(UserError, match=rf"x.jsonl, line {first}: not valid JSON"):
            excerpt(lines)


@pytest.mark.parametrize(
    ("content", "reason", "parts"),
    [
        (b'{"text": "fine"}\n{"text": \n', "invalid_json", ["line 2", "not valid JSON"]),
        (b'{"text": "\\ud800"}\n', "invalid_json", ["line 1", "not valid JSON"]),
        (b'{"text": NaN}\n', "invalid_json", ["line 1", "not valid JSON"]),
        (
            b'{"text": "fine"}\n{"txt": "x"}\n',
            "missing_key",
            ["line 2", "no key 'text'", "'txt'", "--text-key", "or rename them"],
        ),
        (b'{"text": 7}\n', "wrong_type", ["line 1", "'text' is of type int"]),
        (b'{"text": null}\n', "wrong_type", ["line 1", "'text' is of type NoneType"]),
        (b'{"text": ""}\n', "empty_text", ["line 1", "a text of length 0"]),
        (b'"text"\n', "wrong_type", ["line 1", "not a JSON object"]),
        (b'[{"text": "a"}]\n', "wrong_type", ["line 1", "an array, but each line must hold an object", "jq"]),
        (b"[\n", "invalid_json", ["line 1", "not valid JSON", "one of several lines", "jq"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "invalid_utf8", ["line 2", "not valid UTF-8"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, reason: str, parts: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_all([path], TEXT))
    for part in [str(path), *parts]:
        assert part in str(caught.value)
    with pytest.raises(BadRecord) as bad:
        documents(content.splitlines()[-1], TEXT, False)
    assert bad.value.reason == reason


def test_an_empty_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "", "a": "fine"}\n{"q": "x", "a": ""}\n')
    with pytest.raises(UserError, match="line 2: an answer of length 0"):
        list(read_all([path], Keys(("q", "a"))))


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path) -> None:
    """Whether the limit cuts it before, in or behind its line end; the lines around it are read."""
    for size in (9, 10, 11, 12, 13, 500):
        path = tmp_path / f"{size}.jsonl"
        path.write_bytes(b"1\n" + b"x" * size + b"\r\n2\n")
        source = Source.of_file(path)
        reader = SpanReader(source, Span(0, 0, source.size, source.size), TEXT.reading(10))
        found = list(reader)
        assert [position for position, _ in found] == [0, 2, size + 4]
        assert [found[0][1], found[2][1]] == [b"1\n", b"2\n"]
        assert isinstance(found[1][1], BadRecord) == (size > 10)


def test_nested_keys() -> None:
    line = b'{"a": {"b": {"c": "deep"}}, "a.b": "flat"}'
    assert documents(line, Keys(("a.b.c",)), False) == [("deep",)]
    assert documents(line, Keys(("a.b",)), False) == [("flat",)]
    with pytest.raises(BadRecord, match=r"no key 'a.x'"):
        documents(line, Keys(("a.x",)), False)
    with pytest.raises(BadRecord, match=r"no key 'a.b.c.d'"):
        documents(line, Keys(("a.b.c.d",)), False)


def test_chat_messages() -> None:
    def of(
        *turns: tuple[str, str], template: str = "{role}: {content}\n", every_turn: bool = False
    ) -> list[tuple[str, ...]]:
        line = json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}).encode()
        keys = Keys(("messages",), messages=True, message_format=template, every_turn=every_turn)
        return documents(line, keys, False)

    chat = (("system", "Be {role}."), ("user", "2+2?"), ("assistant", "4"))
    assert of(*chat) == [("system: Be {role}.\nuser: 2+2?\nassistant: ", "4")]
    assert of(*chat, template="<{role}>{content}</>") == [
        ("<system>Be {role}.</><user>2+2?</><assistant>", "4")
    ]
    assert of(("assistant", "hi")) == [("assistant: ", "hi")]
    more = (*chat, ("user", "3+3?"), ("assistant", ""), ("assistant", "6"), ("user", "Thanks"))
    assert of(*more, every_turn=True) == [
        of(*chat)[0],
        ("system: Be {role}.\nuser: 2+2?\nassistant: 4\nuser: 3+3?\nassistant: \nassistant: ", "6"),
    ]
    for turns, reason in (
        (chat[:2], "empty_answer"),
        ((*chat[:2], ("assistant", "")), "empty_answer"),
        ((), "wrong_type"),
    ):
        with pytest.raises(BadRecord) as caught:
            of(*turns)
        assert caught.value.reason == reason


def test_sentences() -> None:
    assert sentences('He said "No." Then e.g. 3.14 of it... left!  So?') == [
        'He said "No."', "Then e.g.", "3.14 of it...", "left!", "So?"
    ]  # fmt: skip
    assert sentences("好。是吗？」对") == ["好。", "是吗？」", "对"]
    line = json.dumps({"text": "One.\nTwo!  \n Three"}).encode()
    assert documents(line, Keys(("text",), split="sentence"), False) == [("One.",), ("Two!",), ("Three",)]
    with pytest.raises(BadRecord):
        documents(b'{"text": " \\n "}', Keys(("text",), split="line"), False)


def test_inputs_are_checked_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        check_inputs([tmp_path / "nowhere.jsonl"], TEXT)
    for name in ("x.txt", "x.pdf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"x.pdf: unknown file type; use .jsonl"):
        check_inputs([tmp_path / "x.pdf"], TEXT)
    with pytest.raises(UserError, match="pairs come from jsonl"):
        check_inputs([tmp_path / "x.txt"], Keys(("q", "a")))


def test_a_glob_that_matches_folders_alone_matches_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no file matches"):
        find([f"{tmp_path}/*"])
    (tmp_path / "x.txt").touch()
    assert find([f"{tmp_path}/*"]) == [tmp_path / "x.txt"]


def test_what_a_folder_holds_besides_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By number and suffix, in one line for all folders; what is hidden does not count."""
    for name in (
        "a/x.jsonl", "a/y.json.lz4", "a/z.json.lz4", "a/README.md", "a/_SUCCESS", "b/t.tsv.gz", "b/x.txt",
        "a/.x.jsonl", "a/.cache/y.jsonl", "c/x.lz4",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/.cache/more.lock").touch()
    assert find([f"{tmp_path}/a", f"{tmp_path}/b"]) == [tmp_path / "a/x.jsonl", tmp_path / "b/x.txt"]
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    start = "skipped files of unknown types: 2 .json.lz4, 1 .md, 1 without a suffix, 1 .tsv.gz. Known types:"
    assert line.startswith(start)
    with pytest.raises(UserError, match=r"c holds no file of a known type \(1 \.lz4\); use .jsonl"):
        find([f"{tmp_path}/c"])
    for number in range(9):
        (tmp_path / f"b/part.{number}").touch()
    find([f"{tmp_path}/b"])
    assert "1 .4, 5 others. Known" in capsys.readouterr().err
    find([f"{tmp_path}/a/x.jsonl"])
    assert capsys.readouterr().err == ""


def test_kinds_are_told_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "X.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "y.Txt").write_text("b\n")
    found = find([str(tmp_path)])
    assert [record.texts for record in read_all(found, TEXT)] == [("a",), ("b",)]


def test_broken_links_and_circular_lists_are_named(tmp_path: Path) -> None:
    """A link whose file has gone would be left out unseen."""
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    for meant in (str(tmp_path), f"{tmp_path}/*.jsonl"):
        with pytest.raises(UserError, match=r"b.jsonl is a broken link"):
            find([meant])
    (tmp_path / "one").write_text(f"@{tmp_path}/two\n")
    (tmp_path / "two").write_text(f"{tmp_path}/a.jsonl\n@{tmp_path}/one\n")
    with pytest.raises(UserError, match=r"--input @.*/one: the list contains itself"):
        find([f"@{tmp_path}/one"])


def test_linked_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.jsonl").touch()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    assert find([f"{tmp_path}/corpus"]) == [tmp_path / "corpus/linked/x.jsonl"]


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    """By name, glob, folder, list or link: with its name and both inputs."""
    (tmp_path / "d").mkdir()
    path = tmp_path / "d/x.jsonl"
    path.touch()
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "list").write_text(f"{path}\n")
    inputs = [
        path,
        f"{tmp_path}/d/*.jsonl",
        tmp_path / "d",
        f"{tmp_path}/d/../d/x.jsonl",
        tmp_path / "link.jsonl",
    ]
    for other in inputs:
        with pytest.raises(UserError, match=f"is given twice, by {path} and by {re.escape(str(other))}:"):
            find([str(path), str(other)])
    with pytest.raises(UserError, match=r"link.jsonl is given twice"):
        find([f"@{tmp_path}/list", f"{tmp_path}/link.jsonl"])
