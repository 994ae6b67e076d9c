"""The data of SoS-1K: what each class holds, that every answer is proven, and what is said of mistakes."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import pytest

from luthier.engine.data import open_data
from luthier.engine.sos1k import certified
from luthier.errors import LuthierError
from luthier.eval.accuracy import Accuracy
from luthier.kit import sos1k
from luthier.kit.context import Context
from luthier.kit.polynomial import polynomial
from luthier.kit.regularised import regularised
from luthier.kit.sos1k_prompts import LEVELS, prompt
from luthier.testing import tiny

SPEC = {"source": "sos1k:plain", "set": {"chars": 160, "equal": True}, "split": {"train": 38, "test": 19}}
PROVEN = {
    **dict.fromkeys(("2a", "2.1a", "3.1a", "3.2a", "4a", "5.1a", "5.2a", "5.3a", "5.4a"), True),
    **dict.fromkeys(("2b", "2.1b", "3.1b", "3.2b", "4b"), False),
}
"""Classes whose construction proves what they are."""


def opened(seed=0, **changes):
    return open_data("d", {**SPEC, **changes}, Context(seed=seed))


def drawn(kind, number=0, chars=160):
    return sos1k.draw(kind, chars, Context(seed=5).rng(kind, number))


@pytest.mark.parametrize("kind", sos1k.SIZES)
def test_a_class_is_what_it_says(kind):
    for number in range(3):
        one = drawn(kind, number)
        p = one.polynomial
        assert polynomial(one.text) == p and p.variables == tuple(f"x{i + 1}" for i in range(len(p.variables)))
        assert (p.degree % 2 == 1) == (kind == "1")
        if kind[:3] == "3.1":
            assert p.degree == 2
        if kind[:3] == "3.2":
            assert (p.degree, len(p.variables)) == (4, 2)
        if kind[0] == "4":
            assert regularised(p)
        if kind[:3] == "2.1":
            assert one.text.startswith("(") and ")^2" in one.text
        elif kind != "1":
            assert "(" not in one.text
        proof = one.proof()
        assert (None if proof is None else sos1k.truth(proof)) is PROVEN.get(kind)


def test_the_paper_s_table():
    """1707 polynomials in 19 classes, drawn in proportion at every point, or as many of each."""
    assert (len(sos1k.SIZES), sum(sos1k.SIZES.values())) == (19, 1707)
    whole = Counter(kind for kind, _ in islice(sos1k.order(tuple(sos1k.SIZES), False), 1707))
    assert whole == sos1k.SIZES
    part = Counter(kind for kind, _ in islice(sos1k.order(tuple(sos1k.SIZES), False), 400))
    assert all(abs(part[kind] - 400 * size / 1707) <= 1.5 for kind, size in sos1k.SIZES.items())
    assert Counter(kind for kind, _ in islice(sos1k.order(("1", "2a"), True), 10)) == {"1": 5, "2a": 5}


def test_ill_conditioned_weights_run_from_1_to_a_million_million():
    weights = [w for w, _ in drawn("5.4a").squares]
    assert (max(weights), min(weights)) == (10**12, 1) and weights == sorted(weights, reverse=True)


def test_rank_and_sparsity():
    assert len(drawn("5.3a").squares) == 3 and {w for w, _ in drawn("5.3a").squares} == {1}
    entries = [len(terms) for number in range(4) for _, terms in drawn("5.2a", number).squares]
    assert 1 < sum(entries) / len(entries) < 2.2  # the diagonal, and about a tenth of what is below it
    assert min(len(terms) for _, terms in drawn("5.1a").squares) > 2


def test_longer_texts_hold_larger_polynomials():
    assert max(len(drawn("5.1a", n, 160).text) for n in range(4)) <= 220
    sizes = [len(drawn("5.1a", n, 2000).polynomial.variables) for n in range(8)]
    assert max(sizes) > 2 and all(len(drawn("5.1a", n, 2000).text) <= 2000 for n in range(8))


def test_decimals_are_exact():
    terms = {(2, 0): Fraction(-1), (1, 1): Fraction(13, 4), (0, 1): Fraction(1, 1000), (0, 0): Fraction(-7, 2)}
    assert sos1k.decimals(polynomial(terms)) == "-x1^2 + 3.25*x1*x2 + 0.001*x2 - 3.5"
    assert sos1k.decimals(polynomial("0")) == "0"


def test_every_answer_is_proven():
    data = opened()
    assert (len(data.train), len(data.test)) == (38, 19) and data.overlap() == 0
    for item in (*data.train[::3], *data.test):
        proof = data.certificate(item)
        assert proof.refusal() is None and sos1k.truth(proof) is (item.answer == "Yes")
        assert polynomial(item.meta["problem"]).terms == tuple((m, Fraction(c)) for m, c in proof.polynomial)
    assert {item.meta["class"] for item in data.train} >= set(sos1k.SIZES) - {"5.4b"}  # many of which nothing decides
    assert all(PROVEN.get(i.meta["class"]) in (None, i.answer == "Yes") for i in data.train)


def test_an_indefinite_matrix_is_no_refutation():
    """Of class 5.2b, whose matrix is indefinite, some are sums of squares by another one: the certificate decides."""
    found = [certified(drawn("5.2b", number)) for number in range(12)]
    truths = Counter(None if one is None else sos1k.truth(one) for one in found)
    assert truths[True] and truths[False]


def test_what_nothing_decides_is_left_out_and_counted(monkeypatch):
    from luthier.engine import sos1k as engine

    real = engine.certified
    monkeypatch.setattr(engine, "certified", lambda one: None if one.polynomial.degree == 2 else real(one))
    data = opened(seed=77, set={"chars": 160, "classes": ["2a", "3.1a"]}, split={"train": 6, "test": 2})
    assert {item.meta["class"] for item in data.train} == {"2a"} and data.dropped.keys() == {"3.1a"}
    assert data.dropped["3.1a"] >= 2


def test_all_levels_ask_about_the_same():
    several = {level: opened(source=f"sos1k:{level}") for level in LEVELS}
    ids = {level: [item.id for item in (*data.train, *data.test)] for level, data in several.items()}
    assert ids["plain"] == ids["simple"] == ids["reasoning"]
    assert len({data.hash() for data in several.values()}) == 3
    lengths = [len(several[level].test[0].prompt) for level in ("plain", "simple", "reasoning")]
    assert lengths == sorted(lengths) and lengths[0] < lengths[2] / 4
    for level, data in several.items():
        assert data.test[0].prompt == prompt(level, data.test[0].meta["problem"])


def test_decided_by_the_seed_alone(tmp_path):
    assert opened().test == opened().test and opened().hash() == opened().hash()
    assert opened(seed=1).test != opened().test and opened(seed=1).hash() != opened().hash()
    fewer = opened(split={"train": 10, "test": 5})
    assert {item.id for item in fewer.test} <= {item.id for item in opened().test}
    cached = open_data("d", SPEC, Context(seed=0, cache=tmp_path))
    assert list(cached.test) == list(opened().test) and len(list(tmp_path.iterdir())) == 1


def test_answers_in_any_wording():
    data = opened()
    (yes,) = [item for item in data.test if item.answer == "Yes"][:1]
    for right in ("Yes", "yes.", "**Yes**", "The answer is: yes", "Yes, it is a sum of squares"):
        assert data.score(yes, right) == 1, right
    for wrong in ("No", "no", "It is not", "", "maybe"):
        assert data.score(yes, wrong) == 0, wrong


def test_a_model_is_scored_by_accuracy():
    """`eval.accuracy` takes it as any other data."""
    data = opened(split={"train": 4, "test": 3})
    table = Accuracy(max_new_tokens=2).measure([tiny.subject("m", tiny.llama())], [data], Context())
    assert [row["item"] for row in table.dicts()] == [item.id for item in data.test]


def test_prompts_ask_one_thing():
    for level in LEVELS:
        text = prompt(level, "x1^2 + 1")
        assert text.count("x1^2 + 1") == 1 and text.startswith("Is this polynomial") and text.endswith("alone.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "sos1k:hard"}, "data.d: source: unknown level 'hard'; known: plain, reasoning, simple"),
        ({"source": "sos1k:reasonning"}, "did you mean 'reasoning'?"),
        ({"set": {"char": 3}}, "data.d: set: unknown setting of sos1k 'char'; did you mean 'chars'?"),
        ({"set": {"chars": 5}}, "set.chars: expected a count from 20 to 40000, got 5"),
        ({"set": {"chars": True}}, "set.chars"),
        ({"set": {"equal": 1}}, "set.equal: expected true or false, got 1"),
        ({"set": {"classes": ["5.5a"]}}, "set.classes: unknown class '5.5a'"),
        ({"set": {"classes": []}}, "set.classes: no class"),
        ({"form": "text"}, "form: 'text' is for gym tasks"),
        ({"split": {"train": 0.5}}, "split.train: expected a count, got 0.5"),
        ({"split": {"by": "line"}}, "split.by"),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(LuthierError) as fault:
        opened(**changes)
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_more_than_there_are(monkeypatch):
    """Drawing ends, and the error says how far it came."""
    from luthier.engine import sos1k as engine

    monkeypatch.setattr(engine, "MOST_TRIES", 0)
    with pytest.raises(LuthierError, match=r"data\.d: split: only \d+ training and 1 test items that differ in 201"):
        _ = opened(set={"chars": 20, "classes": [1]}, split={"train": 300, "test": 1}).train
