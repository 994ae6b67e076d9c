"""`luthier demo`: both columns are run, and at the reducing fields they are what they claim."""

import pytest

from luthier.catalogue import cards, load
from luthier.cli import main
from luthier.testing import demo

LENGTH = demo.STEPS
ONE_A_SHAPE = ("block.moe", "objective.next_token", "optim.adamw", "tune.random", "merge.ties", "decode.sample",
               "eval.perplexity")  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 8)
    for made in (demo._base, demo._specialists, demo._answering, demo._filling):
        made.cache_clear()


@pytest.mark.parametrize("id_", ONE_A_SHAPE)
def test_two_columns(id_):
    shown = demo.demo(id_)
    assert shown.heads[0] == id_ and len(shown.rows) >= 3
    assert all(len(row) == 3 for row in shown.rows) and shown.rows[-1][0] == "seconds"
    assert any(left for _, left, _ in shown.rows) and any(right for _, _, right in shown.rows)


def test_the_right_column_is_the_reduced_method():
    rows = {label: (left, right) for label, left, right in demo.demo("tune.random").rows}
    few, all_ = (int(text.replace(",", "")) for text in rows["numbers that train"])
    assert few < all_ / 10
    assert demo.sides("tune.random")[2] == "share: 1.0 (tune.full)"
    assert demo.sides("merge.task_arithmetic")[1].scale == 0


def test_every_method_has_two_sides():
    for id_ in cards():
        method, other, name = demo.sides(id_)
        assert name and (other.id == id_ or other.id == name)


def test_the_columns_differ_or_say_why_not():
    """At the length that a user sees, so that a reset lies within it."""
    for id_ in cards():
        method, other, name = demo.sides(id_)
        assert (method == other) == name.startswith("the same again"), id_
    assert demo.sides("optim.stable_spam")[0].reset < LENGTH / 2
    assert demo.sides("sos.certify")[2] == "basis: full"


def test_a_measure_asks_a_trained_model_in_the_form_it_knows(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 40)
    rows = demo._measure(load("eval.perplexity"))
    random, trained = ([float(v.split()[1]) for k, v in rows.items() if k.startswith(w)] for w in ("random", "trained"))
    assert len(random) == len(trained) == 4 and max(trained) < min(random) - 1


def test_prophet_fires(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", LENGTH)
    method, other, _ = demo.sides("decode.prophet")
    early, late = (int(demo._decode(m)["forward passes"]) for m in (method, other))
    assert early < late == 16


def test_the_command(capsys):
    assert main(["demo", "merge.ties"]) == 0
    out = capsys.readouterr().out
    assert "density: 1.0" in out and "held-out nats, sums" in out and "not how well" in out
    assert main(["demo", "merge.tie"]) == 2
    assert "did you mean 'merge.ties'" in capsys.readouterr().err
