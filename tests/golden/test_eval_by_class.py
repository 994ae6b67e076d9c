"""eval.by_class against shares counted by hand."""

from dataclasses import replace

import pytest

from luthier.eval.accuracy import Accuracy
from luthier.eval.by_class import COLUMNS, ByClass
from luthier.flows import Item
from luthier.kit.context import Context
from luthier.testing import tiny
from luthier.testing.measure import subjects

SUMS = tiny.task_data(train=24, test=8)
PROBLEMS = {"x^2 + 1": "Yes", "x^2 - 1": "No", "x^3": "Yes", "x^4*y^2 + x^2*y^4 - 3x^2*y^2 + 1": "No"}


class Said(tiny.TinyData):
    """Answers are right where they are the same word."""

    def score(self, item, output):
        return float(item.answer == output)


def asked(answers=PROBLEMS, kinds=("a", "b", "b", "a"), train=("Yes", "Yes", "No")):
    test = [
        Item(id=str(i), prompt=text, answer=answer, meta={"class": kind, "problem": text})
        for i, ((text, answer), kind) in enumerate(zip(answers.items(), kinds, strict=True))
    ]
    return Said("sos", [Item(id=f"t{i}", prompt="p", answer=a) for i, a in enumerate(train)], test, scored=True)


def rows(method, models=(), data=None):
    table = method.measure(list(models), [data or asked()], Context())
    assert table.columns == COLUMNS
    return {(r["model"], r["class"], r["metric"]): (r["value"], r["items"]) for r in table.dicts()}


def test_shares_of_two_models_in_three_classes():
    """Each model's share in a class is the mean of its items' values, in the order in which classes appear."""
    data = tiny.task_data(train=24, test=8)
    kinds = ["odd" if i % 3 else "third" for i in range(8)]
    kinds[5] = "lone"
    data.test[:] = [replace(item, meta={"class": kind}) for item, kind in zip(data.test, kinds, strict=True)]
    models = subjects("base", "good")
    single = Accuracy(max_new_tokens=4)
    found = rows(ByClass(accuracy=single), models, data)
    values = single.measure(models, [data], Context()).where(model="good")
    for kind in ("odd", "third", "lone"):
        mine = [row["value"] for row, one in zip(values, kinds, strict=True) if one == kind]
        assert found[("good", kind, "accuracy")] == (sum(mine) / len(mine), len(mine))
    assert found[("good", "all", "accuracy")] == (sum(row["value"] for row in values) / 8, 8)
    assert found[("good", "all", "accuracy")][0] > 0.5 > found[("base", "all", "accuracy")][0]
    assert [kind for model, kind, _ in found if model == "good"] == ["all", "third", "odd", "lone"]


def test_a_draw_and_the_commonest_answer():
    """Two thirds of the training answers are Yes: a draw is right on a Yes 2 times in 3, on a No 1 time in 3."""
    found = rows(ByClass())
    assert found[("chance", "a", "accuracy")] == (pytest.approx((2 / 3 + 1 / 3) / 2), 2)
    assert found[("chance", "b", "accuracy")] == (pytest.approx((1 / 3 + 2 / 3) / 2), 2)
    assert found[("majority", "all", "accuracy")] == (0.5, 4)
    only_yes = rows(ByClass(), data=asked(train=("Yes",)))
    assert only_yes[("chance", "all", "accuracy")] == (0.5, 4)
    assert not any(model == "chance" for model, _, _ in rows(ByClass(), data=asked(train=())))


def test_proofs_beside():
    """x^2 + 1 and x^2 - 1 are answered rightly; x^3 is said to be one and is none; Motzkin's is left open: half."""
    found = rows(ByClass(beside={"use": "sos.sos1k", "set": {"certifier": None}}))
    assert found[("sos.sos1k", "a", "accuracy")] == ((1 + 0.5) / 2, 2)
    assert found[("sos.sos1k", "b", "accuracy")] == ((1 + 0) / 2, 2)
    assert found[("sos.sos1k", "a", "decided")] == (0.5, 2)
    assert found[("sos.sos1k", "all", "decided")] == (0.75, 4)
    solved = rows(ByClass(beside={"use": "sos.certify", "set": {}}))
    assert solved[("sos.certify", "a", "accuracy")] == (1.0, 2)
    assert not any(metric == "decided" for _, _, metric in rows(ByClass()))


def test_items_without_a_problem_or_a_class():
    plain = tiny.task_data(train=24, test=3)
    assert not any(model == "sos.sos1k" for model, _, _ in rows(ByClass(beside="sos.sos1k"), data=plain))
    assert {kind for _, kind, _ in rows(ByClass(), data=plain)} == {"all"}
    assert {kind for _, kind, _ in rows(ByClass(by="problem"))} == {*PROBLEMS, "all"}


def test_the_notes_hold_the_classes():
    """One line a class, models in their order, sources in theirs; nothing where there are no classes."""
    other = Said("more", asked().train, asked().test[:1], scored=True)
    table = ByClass(beside={"use": "sos.sos1k", "set": {"certifier": None}}).measure([], [asked(), other], Context())
    assert table.notes == (
        "by class, on sos / more, in percent",
        "a: chance 50 / 67, majority 50 / 100, sos.sos1k 75 / 100",
        "b: chance 50 / -, majority 50 / -, sos.sos1k 50 / -",
    )
    assert ByClass().measure([], [tiny.task_data(train=4, test=2)], Context()).notes == ()
    one = ByClass().measure([], [asked(kinds="aaaa")], Context())
    assert one.notes == ("by class, on sos, in percent", "a: chance 50, majority 50")


def test_texts_and_fewer_items():
    assert ByClass().measure([], [tiny.text_data()], Context()).rows == ()
    found = rows(ByClass(max_items=3), subjects("base"), SUMS)
    assert found[("base", "all", "accuracy")][1] == 3 and found[("majority", "all", "accuracy")][1] == 3


def test_defaults():
    made = ByClass().to_dict()["set"]
    assert (made["by"], made["beside"], made["max_items"]) == ("class", None, None)
    assert made["accuracy"] == {"use": "eval.accuracy", "set": Accuracy().to_dict()["set"]}
