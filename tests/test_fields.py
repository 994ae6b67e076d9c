"""What a method's dataclass promises: values checked, frozen, hashable, placed in errors, equal after YAML and JSON."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import math
import pickle
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier import catalogue, recipe_text
from luthier.errors import LuthierError, nearest, unknown
from luthier.fields import (
    Count,
    FrozenMap,
    Natural,
    Positive,
    Range,
    Schedule,
    Share,
    Unit,
    coerce,
    freeze,
    thaw,
)
from luthier.recipe import to_yaml
from luthier.shapes import Measure, Method, Reduces, Transform, Tune

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
WORDS = st.text(st.characters(exclude_categories=["C", "Z"]))
"""Text that YAML can hold: it has no control characters."""
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)  # fmt: skip


class Inner(Measure):
    """A method that others hold."""

    level: Annotated[float, Range(0.0, 1.0)] = 0.95

    def measure(self, models, data, ctx): ...


class Outer(Transform):
    """Every kind of field there is."""

    count: Count = 3
    share: Share = 0.5
    decay: Unit = 0.2
    rate: Schedule = 1.0
    mode: Literal["a", "b", 1] = "a"
    name: str = "x"
    fast: bool = False
    limit: int | None = None
    rank: int | Literal["auto"] = "auto"
    pair: tuple[float, float] = (0.9, 0.999)
    several: tuple[Schedule, ...] | None = None
    measure: Measure | None = None
    measures: tuple[Measure, ...] = ()
    anything: Any = None

    reduces_to = Reduces({"decay": 1.0}, "mean")

    def transform(self, tensors, ctx): ...


class Needy(Transform):
    """A field without a default, and fields that exclude each other."""

    count: Count
    share: Share | None = None

    def check(self):
        if self.share is not None and self.count > 1:
            raise LuthierError("count and share exclude each other", where=self.id, do="give one")

    def transform(self, tensors, ctx): ...


@pytest.fixture(autouse=True, scope="module")
def enrolled():
    """The methods of this file, known to the catalogue as another package's are."""
    points = [
        importlib.metadata.EntryPoint(f"here.{cls.__name__.lower()}", f"{__name__}:{cls.__name__}", "luthier.methods")
        for cls in (Inner, Outer, Needy)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "entry_points", lambda group: points)
        catalogue.cards.cache_clear()
        for name in ("inner", "outer", "needy"):
            catalogue.find(f"here.{name}")
        yield
    catalogue.cards.cache_clear()


# ---- frozen values


@given(TREES)
def test_what_is_frozen_is_hashable_and_comes_back(tree):
    frozen = freeze(tree)
    hash(frozen)
    assert thaw(frozen) == tree
    assert freeze(frozen) == frozen


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_order_counts_in_maps(plain):
    """Among globs the last match wins, so {a, b} is not {b, a}."""
    forth, back = FrozenMap(plain), FrozenMap(dict(reversed(plain.items())))
    assert forth == plain
    assert list(forth) == list(plain)
    assert forth != back
    assert hash(forth) == hash(FrozenMap(plain))
    assert len({forth, back, FrozenMap(plain)}) == 2


def test_maps_do_not_change():
    source = {"a": [1, 2]}
    frozen = freeze(source)
    source["a"].append(3)
    source["b"] = 1
    assert frozen == {"a": (1, 2)}
    with pytest.raises(TypeError):
        frozen["a"] = 1
    with pytest.raises((AttributeError, TypeError)):
        frozen.more = 1
    assert frozen != 3
    assert repr(frozen) == "{'a': (1, 2)}"
    assert pickle.loads(pickle.dumps(frozen)) == frozen


# ---- annotations


@pytest.mark.parametrize(
    ("kind", "value", "result"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float, 0.5, 0.5),
        (str, "a", "a"),
        (bool, True, True),
        (None, None, None),
        (int | None, None, None),
        (int | None, 2, 2),
        (int | Literal["auto"], "auto", "auto"),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (tuple[int, ...], [], ()),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (Schedule, 1, 1.0),
        (Schedule, [0, 1], (0.0, 1.0)),
        (Schedule, {"*": 1, "a.*": [0, 1]}, {"*": 1.0, "a.*": (0.0, 1.0)}),
        (Unit, [0, 1], (0.0, 1.0)),
        (Share, 1, 1.0),
        (Natural, 0, 0),
        (Count, 1, 1),
        (Positive, 1e-9, 1e-9),
        (Literal["a", 1], 1, 1),
        (Any, [1, {"a": []}], (1, {"a": ()})),
    ],
)
def test_what_fits(kind, value, result):
    assert coerce(value, kind) == result
    assert type(coerce(value, kind)) is type(result) or isinstance(result, dict)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (int, True, "a whole number"),
        (int, 1.0, "a whole number"),
        (int, "1", "a whole number"),
        (float, "1e-4", "a finite number"),
        (float, math.inf, "never"),
        (float, math.nan, "finite"),
        (float, True, "finite"),
        (bool, 1, "true or false"),
        (bool, "yes", "true or false"),
        (str, 1, "a word"),
        (str, None, "a word"),
        (None, 0, "nothing (null)"),
        (int | None, "a", "a whole number or nothing (null), got 'a'"),
        (tuple[float, float], [1], "a list of 2"),
        (tuple[float, float], 1, "a list"),
        (tuple[int, ...], "ab", "a list"),
        (Schedule, [], "a list"),
        (Schedule, "fast", "got 'fast'"),
        (Schedule, {"a": "b"}, "got"),
        (Unit, 1.1, "1.1 is out of range; use a number from 0.0 up to 1.0"),
        (Unit, [0.5, -0.1], "-0.1 is out of range"),
        (Unit, {"*": [0, 2]}, "2.0 is out of range"),
        (Share, 0, "above 0.0"),
        (Positive, 0.0, "above 0.0"),
        (Count, 0, "from 1"),
        (Natural, -1, "from 0"),
        (Literal["model", "tensor"], "tensors", "did you mean 'tensor'?"),
        (Literal["a", 1], True, "unknown value"),
        (Literal["a", 1], 1.0, "unknown value"),
        (Measure, 3, "Measure"),
    ],
)
def test_what_does_not_fit(kind, value, says):
    with pytest.raises(LuthierError) as fault:
        coerce(value, kind)
    assert says in str(fault.value)
    assert "\n" not in str(fault.value)


def test_range_is_checked_inside_unions():
    """The out-of-range alternative is reported rather than "expected nothing"."""
    with pytest.raises(LuthierError, match="5.0 is out of range"):
        coerce(5, Share | None)
    assert str(Range(0.0)) == "from 0.0" and str(Range(high=1.0)) == "up to 1.0"


@given(st.one_of(SCALARS, TREES))
def test_coercion_gives_a_value_or_one_clear_error(value):
    for kind in (int, float, str, bool, Unit, Schedule, Literal["a", "b"], tuple[int, ...], int | None):
        try:
            result = coerce(value, kind)
        except LuthierError as fault:
            assert fault.what
        else:
            hash(result)
            assert coerce(thaw(result), kind) == result


# ---- methods


def test_constructors_check_and_place():
    outer = Outer(several=[1, [0, 1], {"*": 2}], decay={"*": 0, "layers.*": [0, 1]})
    assert outer.several == (1.0, (0.0, 1.0), {"*": 2.0})
    hash(outer)
    for fields, says in (
        ({"decay": 2}, "here.outer.decay: 2.0 is out of range"),
        ({"mode": "c"}, "here.outer.mode: unknown value 'c'"),
        ({"dekay": 0.1}, "here.outer: unknown field 'dekay'; did you mean 'decay'?"),
        ({"limit": 1.5}, "here.outer.limit: expected a whole number"),
    ):
        with pytest.raises(LuthierError) as fault:
            Outer(**fields)
        assert str(fault.value).startswith(says)


def test_required_fields_positions_and_contradictions():
    with pytest.raises(LuthierError, match="field 'count' is required"):
        Needy()
    with pytest.raises(LuthierError, match="fields are given by name; known: count, share"):
        Needy(1)
    with pytest.raises(LuthierError, match="exclude each other; give one"):
        Needy(count=2, share=0.5)
    with pytest.raises(LuthierError, match="exclude each other"):
        Needy(count=1, share=0.5).replace(count=2)


def test_instances_are_frozen_and_apart_from_what_they_were_given():
    betas = [0.5, 0.6]
    outer = Outer(pair=betas)
    betas[0] = 9
    assert outer.pair == (0.5, 0.6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        outer.count = 4
    assert outer.replace(count=4) != outer
    assert outer.replace(count=4).replace(count=3) == outer
    assert len({outer, Outer(pair=(0.5, 0.6))}) == 1


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(1, 10**12),
        "share": st.floats(1e-300, 1.0),
        "decay": st.lists(st.floats(0, 1), min_size=1),
        "rate": st.dictionaries(WORDS, st.floats(-1e300, 1e300), min_size=1),
        "mode": st.sampled_from(["a", "b", 1]),
        "name": WORDS,
        "fast": st.booleans(),
        "limit": st.none() | st.integers(),
        "rank": st.just("auto") | st.integers(),
        "measure": st.none() | st.builds(Inner, level=st.floats(0, 1)),
        "measures": st.lists(st.builds(Inner), max_size=3),
        "anything": TREES,
    },
)


@given(VALUES)
def test_methods_come_back_from_json(fields):
    outer = Outer(**fields)
    again = Method.from_value(json.loads(json.dumps(outer.to_dict(), allow_nan=False)))
    assert again == outer and hash(again) == hash(outer)


@given(VALUES)
def test_methods_come_back_from_yaml(fields):
    outer = Outer(**{k: v for k, v in fields.items() if k != "anything"})
    assert Method.from_value(recipe_text.parse(to_yaml(outer.to_dict())).value) == outer


def test_nested_methods():
    """By id, by {use, set}, by instance; of the right shape only; to_dict keeps the type."""
    by_id, by_map, by_hand = (
        Outer(measure=value)
        for value in ("here.inner", {"use": "here.inner", "set": {"level": 0.95}}, Inner(level=0.95))
    )
    assert by_id == by_map == by_hand
    assert by_id.to_dict()["set"]["measure"] == {"use": "here.inner", "set": {"level": 0.95}}
    assert Outer(measures=["here.inner", {"use": "here.inner", "set": {"level": 0.5}}]).measures[1].level == 0.5
    for value, says in (
        ("here.outer", "expected a method of shape Measure"),
        ("here.iner", "unknown method 'here.iner'; did you mean 'here.inner'?"),
        ({"use": "here.inner", "sets": {}}, "write {use: ID, set: {...}}"),
        ({"set": {}}, "write {use: ID, set: {...}}"),
        ({"use": "here.inner", "set": {"level": 2}}, "here.inner.level: 2.0 is out of range"),
        (7, "expected a method of shape Measure or nothing (null), got 7"),
    ):
        with pytest.raises(LuthierError) as fault:
            Outer(measure=value)
        assert says in str(fault.value), str(fault.value)


def test_methods_are_final():
    with pytest.raises(TypeError, match="methods are final"):
        type("Sub", (Outer,), {"__module__": __name__})
    with pytest.raises(TypeError):
        Tune()


def test_a_shape_is_open_until_its_verb_is_there():
    Half = type("Half", (Transform,), {"__module__": __name__, "__annotations__": {}})
    with pytest.raises(TypeError, match="transform"):
        Half()


# ---- errors


def test_errors_are_one_line():
    fault = LuthierError("what", where="file:3", do="act")
    assert str(fault) == "file:3: what; act"
    assert str(fault.at("up")) == "up: file:3: what; act"
    assert str(LuthierError("what")) == "what"
    assert str(LuthierError("what").at("here")) == "here: what"
    assert fault.args[0] == str(fault)


@pytest.mark.parametrize(
    ("word", "known", "near"),
    [
        ("merge.tie", ["merge.ties", "merge.linear"], "merge.ties"),
        ("ties", ["merge.ties", "merge.linear"], "merge.ties"),
        ("dense", ["density", "scope"], "density"),
        ("zzz", ["density", "scope"], None),
        ("x", [], None),
    ],
)
def test_the_nearest_name(word, known, near):
    assert nearest(word, known) == near
    text = str(unknown("field", word, known, "here"))
    assert text.startswith(f"here: unknown field {word!r}")
    assert (f"did you mean {near!r}?" in text) == (near is not None)
    assert ("known: " in text) == (near is None and bool(known))


def test_a_long_list_is_cut():
    assert str(unknown("method", "qqq", [f"m{i:02}" for i in range(30)])).endswith("m11, ...")


# ---- the catalogue


def test_methods_of_another_package_are_found():
    card = catalogue.card("here.outer")
    assert (card.shape, card.cls, card.stage) == ("Transform", "Outer", "here")
    assert [f.name for f in card.fields] == [f.name for f in dataclasses.fields(Outer)]
    assert card.reduces_to == "mean at decay=1.0 (exactly)"
    assert catalogue.load("here.outer", count=5) == Outer(count=5)
    assert Outer().id == "here.outer"
    assert len(catalogue.source_hash("here.outer")) == 16
    json.dumps(card.as_dict(), allow_nan=False)


CODE = '''"""Head."""

class A:
    x: int = 1  # why
    """what x is"""
    text = """
# not a comment

"""
'''


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [("Head.", "Another\nhead.", False), ("what x is", "what it is", False), ("\nclass", "\n\n# note\nclass", False),
     ("= 1", "= 2", True), ("# not a", "# but a", True), ("comment\n\n", "comment\n", True)],
)  # fmt: skip
def test_what_a_hash_of_code_counts(tmp_path, old, new, counts):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(CODE)
    other.write_text(CODE.replace(old, new))
    assert old in CODE and (catalogue.code_hash(one) != catalogue.code_hash(other)) is counts


def test_an_id_cannot_be_taken_twice(monkeypatch):
    point = importlib.metadata.EntryPoint("merge.ties", f"{__name__}:Outer", "luthier.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(LuthierError, match="'merge.ties' .* is taken; rename the entry point"):
        catalogue.cards.__wrapped__()


@pytest.mark.parametrize("source", ['"""Bad: a file.""" this is no Python', None])
def test_a_broken_method_of_another_package_is_one_line(monkeypatch, tmp_path, source):
    if source:
        (tmp_path / "their_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    point = importlib.metadata.EntryPoint(
        "merge.theirs", "their_method:Theirs" if source else "no.such:T", "luthier.methods"
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    with pytest.raises(LuthierError, match="'merge.theirs' of another package cannot be read .*; mend that package"):
        catalogue.cards.__wrapped__()


def test_the_paper_may_take_more_than_a_line(tmp_path):
    path = tmp_path / "odd.py"
    for rest, paper in ((" (one),\n2222.22222 (two).  More\nof it.", "arXiv 1111.11111 (one), 2222.22222 (two)"),
                        (".\nMore.", "arXiv 1111.11111"), ("\n\nB: rows.", "arXiv 1111.11111")):  # fmt: skip
        path.write_text(f'"""Odd: a file.\n\nPaper: arXiv 1111.11111{rest}\n"""\nclass Odd(Tune):\n    x: int = 1\n')
        card = catalogue.read(path, "tune.odd", "odd")
        assert card and card.paper == paper and card.as_dict()["roles"] == ["model", "data*"]


def test_our_methods_have_ids_of_their_paths():
    for id_, card in catalogue.cards().items():
        if card.module.startswith("luthier."):
            assert card.path == catalogue.HERE / f"{id_.replace('.', '/')}.py"
            assert card.module == f"luthier.{id_}"


def test_the_card_is_read_without_importing(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        '"""Odd: reads a card from a file that cannot run.\n\nPaper: arXiv 1234.56789.  More.\n"""\n'
        "import nothing_of_this_name\nfrom luthier import shapes\n\n\nclass Odd(shapes.Tune):\n"
        '    a: int = 3\n    """the first\n    field"""\n    b: ClassVar[int] = 4\n    c: float\n'
        '    reduces_to = (Reduces({"a": 0}, "tune.full"), Reduces({}, "base", given={"n": 1}, tolerance=1e-3))\n'
        '    departures = ("one",)\n    roles = ("model", "data*")\n'
    )
    card = catalogue.read(path, "tune.odd", "odd")
    assert card is not None
    assert card.summary == "Odd: reads a card from a file that cannot run."
    assert card.paper == "arXiv 1234.56789"
    assert [(f.name, f.kind, f.default, f.doc) for f in card.fields] == [
        ("a", "int", "3", "the first field"), ("c", "float", None, ""),
    ]  # fmt: skip
    assert card.reduces_to == "tune.full at a=0 (exactly); base at its defaults given n=1 (to 0.001)"
    assert (card.departures, card.roles) == (("one",), ("model", "data*"))
    path.write_text("x = 1\n")
    assert catalogue.read(path, "a.b", "odd") is None


def test_every_method_can_be_loaded_by_id():
    for id_, card in catalogue.cards().items():
        if card.module.startswith("luthier."):
            assert getattr(importlib.import_module(card.module), card.cls) is catalogue.find(id_)
