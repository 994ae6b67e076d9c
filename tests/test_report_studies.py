"""Reports of searches: how they got on, the front with its hypervolume, and the best few candidates."""

import dataclasses
import json
import re

import pytest

import luthier
from luthier import report
from luthier.flows import Table
from luthier.report_studies import label, readable, sections
from luthier.testing import tiny


def merge(*weights, **fields):
    return json.dumps({"use": "merge.task_arithmetic", "set": {"weights": list(weights), **fields}})


def trial(number, values, names=("d nll", "e nll"), **more):
    head = {"trial": number, "state": "whole", "items": 8, **dict(zip(names, values, strict=True))}
    rest = {"parameters": 1234567, "seconds": 0.25, "chosen": False}
    return {**head, **rest, "candidate": merge(number) if number else "", **more}


def table(points, names=("d nll", "e nll"), chosen=1, **more):
    """The base and then a trial a point; `more` by trial."""
    rows = [trial(i, p, names, chosen=i == chosen, **more.get(f"t{i}", {})) for i, p in enumerate(points)]
    return Table.from_dicts(rows)


def section(*args, **more):
    return sections({"hunt": table(*args, **more)})[0]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


POINTS = [(3, 3), (1, 2.5), (2, 1), (2.5, 2.5), (4, 4)]


def test_the_front_and_its_hypervolume_by_hand():
    made = section(POINTS)
    assert "4 candidates were judged on 8 training items" in made.text and "stopped" not in made.text
    caption, picture = made.pictures[1]
    assert caption.startswith("2 of 4 candidates are beaten by no other one in every objective: the front.")
    assert "Its hypervolume is 7.5, before the worst" in caption  # 3 x 1.5 and 2 x 1.5 before (4, 4)
    assert {"front", "base", "chosen", "candidate", "d nll", "e nll"} <= set(texts(picture))


def test_the_best_few_with_the_chosen_one_first():
    made = section(POINTS, chosen=3)
    assert made.columns == ("trial", "d nll", "e nll", "parameters", "seconds", "candidate")
    assert [row[0] for row in made.rows] == ["base", "3", "1", "2", "4"] and made.chosen == 1
    assert made.rows[1] == ("3", "2.5000", "2.5000", "1 234 567", "0.2", "merge.task_arithmetic: weights 3")
    many = section([(9, 9)] + [(1 + i / 100, 2 - i / 100) for i in range(60)], chosen=7)
    assert len(many.rows) == 9 and many.rows[1][0] == "7" and len(set(many.rows)) == 9
    twice = section(POINTS, t3={"candidate": merge(1)})
    assert [row[0] for row in twice.rows] == ["base", "1", "2", "4"]
    alone = sections({"x": table([(5,), (3,), (2,), (4,), (1,)], ("d nll",), chosen=3)})[0]
    assert [row[0] for row in alone.rows] == ["base", "3", "4", "2", "1"]


def test_one_objective_has_no_trade_off():
    made = sections({"x": table([(5,), (3,), (2,)], ("d nll",))})[0]
    assert len(made.pictures) == 1
    assert {"d nll", "best so far", "base", "chosen", "judged whole"} <= set(texts(made.pictures[0][1]))


def test_a_single_candidate_is_told_and_not_drawn():
    one = section([(3, 3), (1, 2.5)])
    assert one.text.startswith("One candidate was judged") and not one.pictures and len(one.rows) == 2


def test_stopped_trials_are_marked_and_lead_nothing():
    stopped = {"state": "stopped", "items": 2}
    made = section([*POINTS, (0, 0)], t5=stopped)
    assert "4 candidates were judged" in made.text and "1 more stopped early" in made.text
    assert "stopped" in texts(made.pictures[0][1]) and "stopped" not in texts(section(POINTS).pictures[0][1])
    assert "Crosses were stopped early" in made.pictures[0][0] and "5" not in [row[0] for row in made.rows]
    assert made.pictures[1] == section(POINTS).pictures[1]  # what saw fewer items is on no front
    assert made.pictures[0] != section([*POINTS, (0.5, 0)], t5=stopped).pictures[0]


def test_what_is_off_the_scale_is_counted():
    points = [(1 + i / 50, 2 - i / 50) for i in range(30)]
    wild = section([*points, (80, 2), (90, 2)]).pictures[0][1]
    assert [t for t in texts(wild) if t.startswith("2 higher than 1.8")]
    assert not [t for t in texts(section(points).pictures[0][1]) if "higher" in t]


def test_three_objectives_are_drawn_in_pairs():
    names = ("d nll", "e nll", "e accuracy")
    made = sections({"x": table([(3, 3, 0.5), (1, 2, 0.25), (2, 1, 0.75)], names)})[0]
    said = texts(made.pictures[1][1])
    assert [said.count(n) for n in ("d nll", "e nll", "e wrong answers")] == [2, 2, 2]
    assert "Its hypervolume is 1," in made.pictures[1][0]  # (3 - 1) x (3 - 2) x (0.75 - 0.25), and nothing more
    assert made.columns[3] == "e wrong answers" and made.rows[1][3] == "25.0%"
    assert label("a b accuracy") == "a b wrong answers" and label("a nll") == "a nll"


def test_what_no_candidate_moves_is_no_objective():
    names = ("d nll", "e nll", "e accuracy")
    made = sections({"x": table([(4, 4, 1.0), (1, 2, 1.0), (2, 1, 1.0)], names)})[0]
    assert "hypervolume is 8," in made.pictures[1][0]  # 3 x 2 + 2 x 3 - 2 x 2
    assert made.pictures[1][0].endswith("e wrong answers is the same for all and left out.")
    assert "e wrong answers" in texts(made.pictures[0][1]) and "e wrong answers" not in texts(made.pictures[1][1])
    assert "100.0%" in "".join(texts(made.pictures[0][1])) and len(section([(1, 1), (1, 2), (1, 3)]).pictures) == 1


def test_a_front_has_one_hypervolume():
    """Where the search has told its own, before another reference, the picture tells that one."""
    told = table([(3, 3), (1, 2.5), (2, 1)])
    own = "front: 2 of 2 merges, hypervolume 9 (predicted 8) before the worst of the base (d nll 4, e nll 4)"
    made = sections({"x": dataclasses.replace(told, notes=("cost: 3 s", own))})[0]
    caption = made.pictures[1][0]
    assert caption.endswith(": the front, hypervolume 9 (predicted 8) before the worst of the base (d nll 4, e nll 4).")
    assert caption.count("hypervolume") == 1


def test_many_objectives_have_no_hypervolume():
    names = tuple(f"{x} nll" for x in "abcde")
    made = sections({"x": table([(3,) * 5, (1,) * 5, (2,) * 5], names)})[0]
    assert made.pictures[1][0] == "1 of 2 candidates are beaten by no other one in every objective."


def test_thousands_of_trials_stay_small():
    points = [(1 + (i * 37 % 1009) / 1000, 1 + (i * 91 % 997) / 1000) for i in range(4000)]
    made = section(points)
    assert len(made.rows) == 9 and sum(len(svg) for _, svg in made.pictures) < 600_000


def test_other_tables_are_left_alone():
    assert sections({"x": Table.from_dicts([{"model": "a", "value": 1.0}])}) == []


@pytest.mark.parametrize(
    ("use", "fields", "said"),
    [
        ("merge.task_arithmetic", {"weights": [0.12345, 1.0], "scale": 1.0}, ": weights 0.123, 1"),
        ("merge.task_arithmetic", {"weights": None, "scale": 1.0}, ""),
        ("merge.task_arithmetic", {"scale": {"*norm*": 0.5}}, ": scale (0.5 × *norm*)"),
        (
            "compress.stitch",
            {
                "layers": ["base.0", "base.1", "base.2", "base.5", "0.6", "0.7", "base.8"],
                "outer": "base",
                "gains": None,
            },
            ": layers base.0-2, base.5, 0.6-7, base.8",
        ),
        (
            "compress.stitch",
            {"layers": ["base.1", {"base.2": 0.7, "0.2": 0.3}, "base.3"], "outer": "1"},
            ": layers base.1, (0.7 × base.2 + 0.3 × 0.2), base.3; outer 1",
        ),
        ("else.where", {"a": 1, "inner": {"use": "merge.ties", "set": {}}}, ": a 1; inner (merge.ties)"),
    ],
)
def test_candidates_are_readable(use, fields, said):
    assert readable(json.dumps({"use": use, "set": fields})) == use + said


def test_long_candidates_are_cut():
    text = readable(json.dumps({"use": "else.where", "set": {"x": list(range(0, 200, 2))}}))
    assert len(text) == 160 and text.endswith("…")


def test_a_run_with_a_search(tmp_path):
    base = tiny.checkpoint(tmp_path / "base")
    experts = [str(tiny.expert_of(base, seed)) for seed in (1, 2)]
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i} of a book\n" for i in range(60)))
    split = {"by": "window", "test": 0.3}
    recipe = {
        "luthier": 1,
        "data": {n: {"source": f"text:{tmp_path}/{n}.txt", "split": split, "set": {"chars": 60}} for n in "ab"},
        "steps": {
            "trade": {"use": "merge.map", "base": str(base), "experts": experts, "data": ["a", "b"],
                      "search": {"trials": 4, "items": 2}},
        },
    }  # fmt: skip
    run = luthier.run(recipe, folder=tmp_path / "run")
    page = report.build(run.folder).read_text()
    assert "Search: trade" in page and "steps/trade/table.json" in page and page.count("<small>chosen</small>") == 1
    assert page.count("<figure") == page.count("<figcaption>") == 2 and 'role="img"' in page
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, re.DOTALL)
    assert ["hypervolume" in c for c in captions] == [False, True] and "Its hypervolume is" not in page  # MAP's own
    assert "merge.task_arithmetic: weights" in page
    assert "predicted" in report.summary(run.folder).studies["trade"].columns[-2]
