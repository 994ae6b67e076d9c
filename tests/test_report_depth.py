"""Reports of tables by layer: a picture of every layer, and only the whole model's numbers in the summary."""

import re

import pytest

import luthier
from luthier import report
from luthier.report_figures import classes, depth, differences
from luthier.testing import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name, seed in (("a", 0), ("b", 1)):
        tiny.checkpoint(home / name, seed, num_hidden_layers=3)
    (home / "book.txt").write_text("".join(f"line {i} of a small book, with {7 * i} words\n" for i in range(60)))
    models = [str(home / "a"), str(home / "b")]
    recipe = {
        "luthier": 1,
        "data": {
            "book": {"source": f"text:{home}/book.txt", "split": {"by": "window", "test": 0.5}, "set": {"chars": 120}}
        },
        "steps": {
            "curse": {"use": "probe.curse_of_depth", "models": models, "data": "book", "set": {"max_items": 2}},
            "depth": {"use": "probe.depth", "models": models, "data": "book", "set": {"max_items": 2}},
        },
    }
    return luthier.run(recipe, folder=home / "run")


def test_summary_shows_whole_models_only(run):
    shown = report.summary(run.folder)
    assert len(shown.rows) == 2
    assert {"book nll", "book variance growth", "book drop, deeper half", "book rank of angular by nll"} <= set(
        shown.columns
    )
    assert not {"book variance", "book jacobian", "book angular"} & set(shown.columns)


def test_report_draws_every_layer(run):
    page = (run.folder / "report.html").read_text() if (run.folder / "report.html").exists() else ""
    page = page or report.build(run.folder).read_text()
    assert "By depth" in page
    for panel in ("variance", "angular", "drop", "jacobian", "nll"):
        assert f"book: {panel}" in page
    assert any("layers that matter most" in note for note in report.summary(run.folder).notes)


def row(model, layer, value, metric="drop", **more):
    return {"model": model, "data": "d", "metric": metric, "layer": layer, "value": value, **more}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_what_is_off_the_scale_is_written_out():
    rows = [row("m", i, 8.25 if i == 0 else 0.1 + 0.01 * i) for i in range(20)]
    assert "layer 0: 8.25" in texts(depth(rows))
    assert not [t for t in texts(depth(rows[1:])) if t.startswith("layer 1")]
    assert not [t for t in texts(depth([{**r, "metric": "variance"} for r in rows])) if t.startswith("layer 0")]


def test_shares_by_class():
    """One panel a source; classes in their order; what was not asked is left blank."""
    made = [("m", "d", "b", 1.0), ("m", "d", "a", 0.25), ("n", "d", "a", 0.5), ("m", "e", "a", 0.0)]
    rows = [{"model": m, "data": d, "class": c, "value": v, "items": 4} for m, d, c, v in made]
    found = texts(classes(rows))
    assert sorted(t for t in found if t.isdigit()) == ["0", "100", "25", "50"]
    assert [t for t in found if t in ("a", "b")] == ["a", "b"] and {"d", "e", "m", "n"} <= set(found)
    assert len(texts(classes([{**r, "data": str(i)} for i in range(5) for r in rows]))) > 20


def test_many_differences_have_labels_of_two_lines():
    rows = [{**row("m", None, 0.1, str(i)), "diff": 0.1, "low": 0.0, "high": 0.2} for i in range(5)]
    assert "difference," in texts(differences(rows)) and "difference, nats per token" in texts(differences(rows[:2]))


def test_changes_are_drawn_where_there_are_any():
    same = [row("m", i, 5.0, change=0.1, error=0.01, last=i) for i in range(10)]
    other = [row("m", i, 7.0, change=0.1, error=0.01, last=i) for i in range(10)]
    assert depth(same) == depth(other) != depth([{**r, "change": None} for r in same])
    assert depth(same) != depth([{**r, "error": 0.02} for r in same])
    assert depth(same) != depth([{**r, "last": r["layer"] + 1} for r in same])


def test_models_are_told_apart():
    rows = [row(model, i, value) for model, value in (("one", 1.0), ("two", 2.0)) for i in range(4)]
    assert {"one", "two"} <= set(texts(depth(rows))) and "one" not in texts(depth(rows[:4]))


def test_the_report_says_what_it_takes_to_load_a_model(tmp_path):
    from luthier.testing.tiny import VOCAB

    (tmp_path / "book.txt").write_text("".join(f"line {i} of a book\n" for i in range(60)))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    new = {"new": {**sizes, "slots": {"norm": "norm.lns"}}, "tokenizer": {"train": "book", "size": VOCAB}}
    split = {"by": "window", "test": 0.5}
    recipe = {
        "luthier": 1, "data": {"book": {"source": f"text:{tmp_path}/book.txt", "split": split, "set": {"chars": 60}}},
        "steps": {"thin": {"use": "tune.full", "model": new, "data": "book",
                           "train": {"steps": 1, "batch": 1, "max_length": 16}}},
    }  # fmt: skip
    page = report.build(luthier.run(recipe, folder=tmp_path / "run").folder).read_text()
    assert "thin: of Luthier&#39;s own decoder" in page and "import luthier.model" in page
    assert "Luthier is not needed" not in page
