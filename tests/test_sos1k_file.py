"""The published evaluation file of SoS-1K, checked: contradictions are found, hostile lines are named."""

import json

import pytest

from luthier.engine.sos1k_file import CELL, check, read
from luthier.errors import LuthierError
from luthier.kit.sos1k import truth
from published_sos1k import LINE_158, LINE_239, LINE_257


def row(polynomial, ans, label="Test_Set_9", **more):
    every = {
        "polynomial": polynomial,
        "ans": ans,
        "label": label,
        "format": "expanded",
        "source": "",
        "description": "",
    }
    return json.dumps(every | more)


def file(tmp_path, *lines):
    path = tmp_path / "evaluation.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Three lines as they were published, and others with a right label, in both ways of writing."""
    return check(file(
        tmp_path_factory.mktemp("sos1k"),
        row(LINE_257, 0, "Test_Set_5_2_negative"), row("x(1)^2-2*x(1)*x(2)+2*x(2)^2", 1), "",
        row(LINE_158, 0, "Test_Set_5_2_negative"), row("x1^3 + x2^2", 0), row(LINE_239, 1, "Test_Set_2"),
        row("x1^4 + x1^2 + 0.1*x2^6 - 3*x1*x2", 0), row("x1^2 +" * 10 + " - ", 1), row(("x1^2 + " * 9999)[:CELL], 1),
        row("x1^3 + x2^2", 0),
    ))  # fmt: skip


def test_contradictions_are_listed_with_their_proofs(published):
    assert [(line.number, line.says, line.truth) for line in published.contradicted] == [
        (1, False, True), (4, False, True), (6, True, False),
    ]  # fmt: skip
    for line in published.contradicted:
        assert line.certificate.refusal() is None and truth(line.certificate) is line.truth
    assert published.lines[2].certificate.squares and published.lines[4].certificate.point
    assert published.lines[1].certificate.variables == ("x1", "x2")


def test_it_reads_well(published):
    said = str(published).split("\n")
    assert said[0] == "9 lines, 7 decided: 4 agree, 3 are contradicted by a certificate"
    assert said[1].startswith("line 1: Test_Set_5_2_negative says no sum of squares; it is a sum of squares: ")
    assert said[3].startswith("line 6: Test_Set_2 says a sum of squares; it is no sum of squares: point: ")
    assert len(said) == 4
    assert published.by_class() == {
        "Test_Set_2": {"agree": 0, "contradicted": 1, "undecided": 0},
        "Test_Set_5_2_negative": {"agree": 0, "contradicted": 2, "undecided": 0},
        "Test_Set_9": {"agree": 4, "contradicted": 0, "undecided": 2},
    }


def test_what_cannot_be_read_is_undecided_and_says_why(published):
    broken, cut = published.lines[6], published.lines[7]
    assert (broken.truth, broken.certificate) == (None, None)
    assert "the polynomial ends too soon" in broken.why
    assert (cut.truth, cut.why) == (None, "the polynomial is cut off at 32767 characters")
    assert not broken.contradicted and str(cut).startswith("line 9: Test_Set_9 says a sum of squares; it is undecided")


def test_what_is_too_large_is_undecided(tmp_path):
    wide = f"({' + '.join(f'x{i}' for i in range(1, 10))})^4 + x1^2 - 0.001*x1*x2^2 + x2^4 + 1"
    (line,) = check(file(tmp_path, row(wide, 1))).lines
    assert line.truth is None and "largest=45 are allowed" in line.why
    (long,) = check(file(tmp_path, row("x1^2 + " * 30_000 + "1", 1))).lines
    assert long.truth is None and "100000 are allowed" in long.why


def test_another_way_to_certify(tmp_path):
    path = file(tmp_path, row("x1^4 - x1^2*x2^2 + x2^4 + 1", 1))
    assert check(path).lines[0].truth is True
    assert check(path, {"use": "sos.sos1k", "set": {"certifier": None}}).lines[0].truth is None
    events = []
    check(path, watch=events.append)
    assert {"polynomials"} <= {event.get("what") for event in events}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"[1, 2]", "expected a JSON object"),
        (b"[" * 5000, "not JSON"),
        (b'{"ans": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"polynomial": "x1", "ans": 1}', "no key 'label'; a line has polynomial, ans, label"),
        (b'{"ans": 1, "label": "a"}', "no key 'polynomial'"),
        (row("x1", "yes").encode(), "ans is 'yes'"),
        (row("x1", True).encode(), "ans is True"),
        (row("x1", 2).encode(), "ans is 2; 1 says a sum of squares, 0 none"),
        (row(["x1"], 1).encode(), "polynomial is ['x1']"),
        (row("x1", 1, label=7).encode(), "label is 7"),
        (row("x1", 1, label=None).encode(), "label is None"),
    ],
    ids=range(13),
)
def test_hostile_lines_are_named(tmp_path, line, words):
    with pytest.raises(LuthierError) as fault:
        check(file(tmp_path, row("x1^2", 1), "  ", line))
    assert f"evaluation.jsonl:3: {words}" in str(fault.value) and "\n" not in str(fault.value)


def test_files_that_are_none(tmp_path):
    for path in (tmp_path / "nothing.jsonl", tmp_path, "a\0b"):
        with pytest.raises(LuthierError, match="no file"):
            check(path)
    assert str(check(file(tmp_path, ""))) == "0 lines, 0 decided: 0 agree, 0 are contradicted by a certificate"


def test_lines_are_read_as_they_stand(tmp_path):
    """A byte order mark, Windows ends of lines, and what other tools take for an end of line inside a text."""
    path = file(tmp_path, b"\xef\xbb\xbf" + row("x1^2", 1).encode() + b"\r", row("x1^2\u2028+ 1", 1))
    assert [number for number, *_ in read(path)] == [1, 2]
