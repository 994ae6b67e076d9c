"""Data by name: what is in it, how it is split, that nothing leaks, and what is said of mistakes."""

import json

import pytest

from luthier.engine.data import TEST_SHARE, check_data, open_data
from luthier.errors import LuthierError
from luthier.kit.context import Context

SUMS = {"source": "gym:chain_sum", "set": {"min_terms": 2, "max_terms": 2}, "split": {"train": 300, "test": 60}}


def ids(items):
    return [item.id for item in items]


def opened(spec, seed=0, **ctx):
    return open_data("d", spec, Context(seed=seed, **ctx))


@pytest.fixture
def folder(tmp_path):
    """Six files; two hold the same header, two are the same file twice, one is no text."""
    header = "# a licence that every file repeats\n" * 3
    for i in range(6):
        body = "".join(f"line {line} of file {i} says {line * i}\n" for line in range(40))
        (tmp_path / f"f{i}.txt").write_text((header if i < 2 else "") + body)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "copy.txt").write_text((tmp_path / "f3.txt").read_text())
    (tmp_path / "picture.bin").write_bytes(bytes(range(128, 256)))
    return tmp_path


# --- gym


def test_gym_gives_the_counts_asked_for_all_different():
    data = opened(SUMS)
    assert (len(data.train), len(data.test)) == (300, 60)
    assert len(set(ids(data.train) + ids(data.test))) == 360 and data.overlap() == 0


def test_gym_is_decided_by_the_seed_alone():
    assert opened(SUMS).test == opened(SUMS, step="another").test
    assert opened(SUMS).hash() == opened(SUMS, step="another").hash()
    assert opened(SUMS).test != opened(SUMS, seed=1).test and opened(SUMS).hash() != opened(SUMS, seed=1).hash()


def test_no_seed_and_no_count_moves_an_item_to_the_other_side():
    """Neighbouring seeds repeat items: whatever another recipe trains on is never tested here."""
    small = {**SUMS, "set": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    tests, trains = set(), set()
    for seed, (train, test) in enumerate([(40, 20), (80, 10), (10, 30)]):
        data = opened({**small, "split": {"train": train, "test": test}}, seed)
        trains |= set(ids(data.train))
        tests |= set(ids(data.test))
    assert len(trains) < 130 and len(tests) < 60  # items do repeat
    assert not trains & tests


def test_about_the_stated_share_is_for_testing():
    large = {"min_terms": 3, "max_terms": 3, "min_digits": 4}  # so large that items do not repeat
    data = opened({**SUMS, "set": large, "split": {"train": 600, "test": 1}})
    seen = max(item.meta["index"] for item in data.train) + 1
    assert 600 / seen == pytest.approx(1 - TEST_SHARE, abs=0.06)


def test_gym_scores_true_answers_in_any_wording():
    data = opened(SUMS)
    for item in data.test[:20]:
        assert data.scored and data.score(item, item.answer) == 1
        assert data.score(item, f"Sure! The answer is {item.answer}.") == 1
        assert data.score(item, str(int(item.answer) + 1)) < 1


def test_gym_is_cached_to_the_byte(tmp_path):
    made = opened(SUMS, cache=tmp_path)
    first = (list(made.train), list(made.test))
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]
    again = opened(SUMS, cache=tmp_path)
    again._generate = None  # would fail if called
    assert (list(again.train), list(again.test)) == first
    assert again.score(again.test[0], again.test[0].answer) == 1
    more = opened({**SUMS, "split": {"train": 10, "test": 60}}, cache=tmp_path)
    assert len(more.train) == 10


def test_a_family_without_enough_items_says_so():
    spec = {**SUMS, "set": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
    with pytest.raises(LuthierError, match=r"data.d.split: gym:chain_sum gave only \d+ training and \d+ test items"):
        _ = opened({**spec, "split": {"train": 500, "test": 50}}).train


# --- the format-only control


def test_shuffled_answers_are_the_same_answers_in_wrong_places():
    true, wrong = opened(SUMS), opened({**SUMS, "answers": "shuffled"})
    assert ids(true.train) == ids(wrong.train)
    assert [i.prompt for i in true.train] == [i.prompt for i in wrong.train]
    assert sorted(i.answer for i in true.train) == sorted(i.answer for i in wrong.train)
    assert all(a.answer != b.answer for a, b in zip(true.train, wrong.train, strict=True))
    assert true.test == wrong.test and true.hash() != wrong.hash()
    given = {}
    for a, b in zip(true.train, wrong.train, strict=True):
        given.setdefault(a.answer, set()).add(b.answer)
    assert max(map(len, given.values())) > 1  # no code that maps each answer to another


def test_shuffling_few_kinds_of_answers_does_what_can_be_done(tmp_path):
    answers = ["yes"] * 6 + ["no"] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    spec = {"source": str(path), "split": {"test": 0}}
    true, wrong = opened(spec), opened({**spec, "answers": "shuffled"})
    moved = sum(a.answer != b.answer for a, b in zip(true.train, wrong.train, strict=True))
    assert moved == 6 and sorted(i.answer for i in wrong.train) == sorted(answers)  # three of each can change places


# --- text


def test_text_splits_by_file_and_never_shares_a_window(folder):
    data = opened({"source": f"text:{folder}", "split": {"by": "file", "test": 0.4}, "set": {"chars": 100}})
    files = [{item.meta["file"] for item in side} for side in (data.train, data.test)]
    assert files[0] and files[1] and data.overlap() == 0 and not data.scored
    assert {i.text for i in data.train}.isdisjoint(i.text for i in data.test)
    assert "picture.bin" not in files[0] | files[1]
    assert all(0 < len(i.text) <= 100 for i in (*data.train, *data.test))


def test_copies_of_a_file_stay_on_one_side(folder):
    for share in (0.4, 0.6, 0.8):
        data = opened({"source": f"text:{folder}", "split": {"by": "file", "test": share}, "set": {"chars": 100}})
        sides = [{"f3.txt", "copy.txt"} & {i.meta["file"] for i in side} for side in (data.train, data.test)]
        assert not (sides[0] and sides[1])


def test_text_windows_lose_nothing(folder):
    spec = {"source": str(folder / "f5.txt"), "split": {"by": "window", "test": 0}, "set": {"chars": 64}}
    windows = sorted(opened(spec).train, key=lambda item: item.meta["window"])
    assert "".join(w.text for w in windows) == (folder / "f5.txt").read_text()
    assert [w.meta["continues"] for w in windows] == [True] * (len(windows) - 1) + [False]
    assert all(w.text.endswith("\n") for w in windows)
    long = folder / "long.txt"
    long.write_text("x" * 150 + "\ny\n")
    texts = [i.text for i in opened({"source": str(long), "split": {"test": 0}, "set": {"chars": 64}}).train]
    assert sorted(map(len, texts)) == [22 + 3, 64] or sorted(map(len, texts)) == [25, 64]  # equal windows count once


def test_one_file_is_split_by_window_and_by_count(folder):
    spec = {"source": str(folder / "f5.txt"), "split": {"test": 3, "train": 5}, "set": {"chars": 100}}
    data = opened(spec)
    assert (len(data.train), len(data.test), data.overlap()) == (5, 3, 0)
    with pytest.raises(LuthierError, match=r"data.d: split.by: .* is one file; split it by window"):
        opened({**spec, "split": {"by": "file"}})


def test_text_depends_on_contents_not_on_names_or_order(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for place, path in enumerate(sorted(folder.glob("*.txt"), reverse=True)):
        (other / f"{place}.txt").write_text(path.read_text())
    (folder / "sub" / "copy.txt").unlink()
    (folder / "picture.bin").unlink()
    spec = {"split": {"by": "file", "test": 0.4}, "set": {"chars": 100}}
    a, b = (opened({"source": f"text:{place}", **spec}) for place in (folder, other))
    assert ids(a.train) == ids(b.train) and ids(a.test) == ids(b.test) and a.hash() == b.hash()
    (folder / "f0.txt").write_text("changed\n")
    assert opened({"source": f"text:{folder}", **spec}).hash() != b.hash()


def test_the_standard_library_is_there_without_its_tests():
    data = opened({"source": "text:stdlib", "split": {"by": "file", "test": 0.2}, "set": {"glob": "[a-d]*.py"}})
    assert len(data.test) > 50 and len(data.train) > len(data.test) and data.overlap() == 0
    assert not any(item.meta["file"].startswith("test_") for item in data.train)


# --- JSON lines


def test_jsonl_reads_text_tasks_and_conversations(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"text": "plain"},
        {"prompt": "2 + 2 =", "answer": "4"},
        {"prompt": "p", "completion": "c"},
        {"messages": turns},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    items = {item.meta["line"]: item for item in opened({"source": f"jsonl:{path}", "split": {"test": 0}}).train}
    assert items[1].text == "plain" and (items[2].prompt, items[2].answer) == ("2 + 2 =", "4")
    assert items[3].answer == "c" and items[4].messages == tuple(turns) and items[4].answer == "hello"


def test_jsonl_scores_short_answers(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]
    rows += [{"prompt": "Where is the Louvre?", "answer": "Paris"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = opened({"source": str(path), "split": {"test": 1.0}})
    assert data.scored and not data.train and len(data.test) == 31
    by_answer = {item.answer: item for item in data.test}
    assert data.score(by_answer["7"], "6 + 1 = 7.") == 1 and data.score(by_answer["7"], "8") == 0
    assert data.score(by_answer["Paris"], "The answer is: paris.") == 1 and data.score(by_answer["Paris"], "Rome") == 0


def test_the_same_question_is_never_on_both_sides(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"prompt": f"q{i % 20}", "answer": str(i)} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = opened({"source": str(path), "split": {"test": 0.5}})
    assert data.overlap() == 0 and len(data.train) + len(data.test) == 20


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "a.jsonl:2: not JSON"), ("[1]", "a.jsonl:2: expected a JSON object"),
        ('{"prompt": 3}', "a.jsonl:2: prompt is not a string"),
        ('{"promt": "x"}', "a.jsonl:2: .*did you mean 'prompt'"),
        ('{"messages": [{"role": "user"}]}', "a.jsonl:2: messages is not a list"), ('{"messages": []}', "a.jsonl:2"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(LuthierError, match=said):
        _ = opened({"source": str(path)}).train


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff\xfe")
    with pytest.raises(LuthierError, match="a.txt: not UTF-8 at byte 3"):
        _ = opened({"source": str(path)}).train


# --- mistakes


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "data.d: no source"),
        ({"source": "gym:chain_sum", "splits": {}}, "data.d: unknown key 'splits'; did you mean 'split'"),
        ({"source": "gym:chain_sum", "split": {"tset": 3}}, "data.d: split: unknown key 'tset'; did you mean 'test'"),
        ({"source": "gym:chain_sum", "split": {"by": "file"}}, "split.by: unknown way to split 'file'; known: hash"),
        ({"source": "gym:chain_sum", "split": {"test": 0.1}}, "split.test: expected a count, got 0.1"),
        ({"source": "text:stdlib", "split": {"test": 1.5}}, "split.test: expected a count .* got 1.5"),
        ({"source": "text:stdlib", "split": {"test": -1}}, "split.test"),
        ({"source": "text:stdlib", "set": {"char": 9}}, "did you mean 'chars'"),
        ({"source": "text:stdlib", "set": {"chars": 0}}, "set.chars: unfit value 0"),
        ({"source": "gym:chain_sum", "answers": "wrong"}, "answers: unknown value 'wrong'"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(spec, said):
    with pytest.raises(LuthierError, match=said):
        check_data("d", spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"source": "gym:chainsum"}, "did you mean 'chain_sum'"),
        ({"source": "gym:chain_sum", "set": {"min_term": 1}}, "did you mean 'min_terms'"),
        ({"source": "gym:chain_sum", "set": {"min_terms": 0}}, "refuses these settings"),
        ({"source": "gym:ransom_note"}, "other items in each process"),
        ({"source": "no/such/file.txt"}, "no file"),
    ],
)
def test_mistakes_are_found_when_data_is_opened(spec, said):
    with pytest.raises(LuthierError, match=said):
        opened(spec)


def test_a_source_alone_is_a_spec():
    assert check_data("d", "gym:gcd").place == "gcd"
    assert [check_data("d", s).kind for s in ("a/b.jsonl", "a/b.txt", "jsonl:x", "text:y", "c:d")] == [
        "jsonl", "text", "jsonl", "text", "text",
    ]  # fmt: skip
