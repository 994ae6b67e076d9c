"""The rules of verdicts, on observations whose verdict is known, and the table that is published."""

import json
import math

import pytest
import torch

from luthier import claims as package
from luthier.claims import Claim, OutOfReach, _claim, _judge, _reproduce, block_coe, judge, reproduce
from luthier.errors import LuthierError


def make(run=None, **changes):
    said = {"id": "toy.one", "sentence": "Better.", "control": "chance", "effect": 0.5, "unit": "nats", **changes}
    return Claim(run=run or (lambda seed, ctx: {}), **said)


def verdict(claim, diffs):
    found = _judge.contrasts(claim, [{"method": 3.0 + d, "control": 3.0} for d in diffs])
    return judge(claim.relation, claim.effect, found), found


@pytest.mark.parametrize(
    ("relation", "diffs", "word"),
    [
        ("above", [1.0, 1.1, 0.9, 1.05], "holds"),
        ("below", [-1.0, -1.1, -0.9, -1.05], "holds"),
        ("below", [1.0, 1.1, 0.9, 1.05], "fails"),
        ("above", [0.1, 0.12, 0.09, 0.11], "fails"),  # surely positive, surely less than declared
        ("above", [2.0, -1.5, 1.8, -0.4], "inconclusive"),
        ("above", [0.45, 0.55, 0.4, 0.5], "inconclusive"),  # the mean is just short, the interval is not
        ("within", [0.01, -0.02, 0.0, 0.01], "holds"),
        ("within", [0.9, 1.0, 1.1, 1.0], "fails"),
        ("within", [-0.9, -1.0, -1.1, -1.0], "fails"),
        ("within", [0.5, 0.3, 0.6, 0.1], "inconclusive"),
        ("above", [0.5] * 5, "holds"),
        ("above", [0.4999] * 5, "fails"),
        ("within", [0.5] * 5, "holds"),
        ("within", [0.6] * 5, "fails"),
    ],
)
def test_the_rule(relation, diffs, word):
    assert verdict(make(relation=relation), diffs)[0] == word


def test_the_interval_is_students_own():
    """Four values with mean 2 and standard deviation 1 (t of 0.975 at 3 degrees of freedom: 3.182)."""
    diffs = [2 + math.sqrt(0.75) * s for s in (-1, 1, -1, 1)]
    _, (found,) = verdict(make(effect=0.1), diffs)
    half = 3.182446 * 1.0 / 2
    assert found["mean"] == pytest.approx(2)
    assert (found["low"], found["high"]) == (pytest.approx(2 - half, abs=1e-5), pytest.approx(2 + half, abs=1e-5))


def test_every_control_counts():
    claim = make()
    seen = [{"method": 3.0 + d, "control/random": 1.0, "control/average": 2.9} for d in (0.0, 0.01, -0.01)]
    found = _judge.contrasts(claim, seen)
    assert [c["control"] for c in found] == ["control/random", "control/average"]
    assert judge("above", 0.5, found[:1]) == "holds"
    assert judge("above", 0.5, found) == "fails"


def test_observations_are_checked():
    for seen in ([{"method": 1.0}], [{"control": 1.0}], [{"method": 1.0, "control": 1.0}, {"method": 1.0}]):
        with pytest.raises(LuthierError, match="observations need"):
            _judge.contrasts(make(), seen)
    with pytest.raises(LuthierError, match="not finite"):
        _judge.contrasts(make(), [{"method": math.nan, "control": 1.0}])


def test_the_table_corrects_for_its_length():
    """A claim at p = 0.03 holds alone and not among forty that are noise."""
    generator = torch.Generator().manual_seed(1)

    def record(id_, p, mean=1.0):
        contrast = {"control": "control", "mean": mean, "low": 0.1, "high": 2.0, "p": p}
        said = {"id": id_, "relation": "above", "effect": 0.5, "needed": 5, "seeds": [0, 1, 2, 3, 4], "reason": ""}
        return {**said, "contrasts": [contrast]}

    alone = record("toy.one", 0.03)
    assert _judge.judge_table([alone])[0]["verdict"] == "holds"
    noise = [record(f"toy.n{i}", p, 0.2) for i, p in enumerate(torch.rand(40, generator=generator).tolist())]
    crowd = _judge.judge_table([alone, *noise])
    assert crowd[0]["verdict"] == "inconclusive"
    assert crowd[0]["adjusted_p"] > 0.05
    exact = record("toy.exact", None)
    assert _judge.judge_table([exact, *noise])[0]["verdict"] == "holds"


@pytest.mark.parametrize(
    ("needed", "seeds", "p", "word", "short"),
    [
        (5, 5, None, "holds", ""),  # the same to the bit at every seed: nothing is random
        (5, 2, None, "inconclusive", "2 of 5 seeds"),
        (5, 4, 0.001, "inconclusive", "4 of 5 seeds"),
        (1, 1, None, "inconclusive", "1 seeds agree, which may be chance: 5 are needed"),
        (3, 3, 0.001, "holds", ""),
    ],
)
def test_too_few_seeds_make_no_verdict(needed, seeds, p, word, short):
    contrast = {"control": "control", "mean": 0.75, "low": 0.75, "high": 0.75, "p": p}
    record = {"id": "toy.one", "relation": "above", "effect": 0.5, "reason": "", "contrasts": [contrast]}
    (judged,) = _judge.judge_table([{**record, "needed": needed, "seeds": list(range(seeds))}])
    assert (judged["verdict"], judged["short"]) == (word, short)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Claims of two toy methods, as files in a folder of their own."""
    home = tmp_path / "claims"
    home.mkdir()
    for name in ("toy_one", "toy_far"):
        (home / f"{name}.py").write_text("CLAIM = None\n")
    table = {
        "toy.one": make(lambda seed, ctx: {"method": 2.0 + 0.01 * seed, "control": 1.0, "cost/steps": 5}, seeds=3),
        "toy.far": make(_far, id="toy.far"),
    }
    monkeypatch.setattr(_claim, "HERE", home)
    monkeypatch.setattr(_reproduce, "claim", table.__getitem__)
    return table


def _far(seed, ctx):
    raise OutOfReach("needs a model of 7B parameters")


def test_reproduce_writes_and_keeps(written, tmp_path):
    first = reproduce(["toy.one"], tmp_path / "docs")
    assert [(r["id"], r["verdict"], r["seeds"], r["cost"]) for r in first] == [
        ("toy.one", "holds", [0, 1, 2], {"steps": 5.0})
    ]
    reproduce(None, tmp_path / "docs")
    far = reproduce(["toy.far"], tmp_path / "docs")
    assert far[0]["verdict"] == "out of reach"
    stored = json.loads((tmp_path / "docs" / "verdicts.json").read_text())["verdicts"]
    assert [(r["id"], r["verdict"]) for r in stored] == [("toy.far", "out of reach"), ("toy.one", "holds")]
    page = (tmp_path / "docs" / "verdicts.md").read_text()
    assert "2 claims: 1 holds, 0 fails, 0 inconclusive, 1 out of reach." in page
    assert "needs a model of 7B parameters" in page and "| 3 seeds, each 5 steps, 20" in page
    assert "+1.01 [+0.985, +1.03] nats against chance (at least 0.5)" in page
    assert not list((tmp_path / "docs").glob("*.part*"))


def test_what_is_not_judged_is_published_too(written, tmp_path):
    written["toy.one"] = make(
        lambda seed, ctx: {"method": 2.0 + 0.01 * seed, "control": 1.0, "also/like for like": 1.0 - seed}, seeds=3
    )
    (record,) = reproduce(["toy.one"], tmp_path)
    assert record["verdict"] == "holds" and record["also"][0]["mean"] == 0
    half = 4.302653 / math.sqrt(3)
    assert f"; not judged, like for like: +0 [{-half:+.3g}, {half:+.3g}] |" in (tmp_path / "verdicts.md").read_text()


def curve(steps=150):
    return [{"terms": {"nll": 10.0 - 0.01 * i}} for i in range(1, steps + 1)]


@pytest.mark.parametrize(("pace", "gap"), [(1.0, 0.0), (1 / 2, 0.75), (1 / 40, 1.38), (12.0, -1.34)])
def test_losses_at_equal_time(pace, gap):
    """150 steps of one are the first 150, 75, 4 or, turned round, 12 of the other; means of the last 20 or fewer."""
    assert block_coe.at_equal_time(curve(), curve(), pace) == pytest.approx(gap, abs=1e-9)


def test_a_verdict_of_an_earlier_source_is_marked(written, tmp_path):
    reproduce(["toy.one"], tmp_path / "docs")
    assert "earlier source" not in (tmp_path / "docs" / "verdicts.md").read_text()
    (tmp_path / "claims" / "toy_one.py").write_text("CLAIM = 1\n")
    reproduce(["toy.far"], tmp_path / "docs")
    page = (tmp_path / "docs" / "verdicts.md").read_text().splitlines()
    assert ["earlier source" in line for line in page if "`toy." in line] == [False, True]


def test_unseen_seeds_alone_are_no_verdict(written, tmp_path):
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[7, 9, 8])
    assert (record["verdict"], record["seeds"], record["short"]) == ("inconclusive", [], "0 of 3 seeds")
    assert (record["unseen"]["verdict"], record["unseen"]["seeds"]) == ("holds", [7, 8, 9])
    assert record["unseen"]["observations"]["9"]["method"] == pytest.approx(2.09)
    page = (tmp_path / "verdicts.md").read_text()
    assert "**inconclusive** | 0 of 3 seeds; on unseen seeds **holds**: +1.08 [" in page
    (own,) = reproduce(["toy.one"], tmp_path)
    assert (own["verdict"], own["seeds"], own["unseen"]["seeds"]) == ("holds", [0, 1, 2], [7, 8, 9])


def test_unseen_seeds_stand_beside_the_verdict(written, tmp_path):
    reproduce(["toy.one"], tmp_path)
    written["toy.one"] = make(lambda seed, ctx: {"method": 1.0 - 0.01 * seed, "control": 1.0}, seeds=3)
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[7, 9])
    assert (record["verdict"], record["seeds"]) == ("holds", [0, 1, 2])
    assert (record["unseen"]["verdict"], record["unseen"]["short"]) == ("inconclusive", "2 of 3 seeds")
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[8])
    assert (record["unseen"]["verdict"], record["unseen"]["seeds"]) == ("fails", [7, 8, 9])
    assert "on unseen seeds **fails**: -0.08 [" in (tmp_path / "verdicts.md").read_text()


def test_unseen_seeds_do_not_replace_a_verdict_of_earlier_code(written, tmp_path):
    reproduce(["toy.one"], tmp_path)
    reproduce(["toy.one"], tmp_path, seeds=[7, 8, 9])
    (tmp_path / "claims" / "toy_one.py").write_text("CLAIM = 1\n")
    assert reproduce(["toy.one"], tmp_path, seeds=[11, 12]) == [], "three unseen seeds stand"
    (record,) = _reproduce.read(tmp_path)
    assert (record["verdict"], record["seeds"], record["unseen"]["seeds"]) == ("holds", [0, 1, 2], [7, 8, 9])
    assert (tmp_path / "verdicts.md").read_text().count("of an earlier source") == 0, "the page is as it was"
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[13])
    assert (record["verdict"], record["unseen"]["seeds"]) == ("holds", [11, 12, 13]) and _reproduce.is_stale(record)
    assert (tmp_path / "verdicts.md").read_text().count("of an earlier source") == 1


def stopped_before_its_last_seed(written, tmp_path):
    """A claim of three seeds, stopped at the third; the list of seeds that are done, which grows with the next run."""
    done = []

    def run(seed, ctx):
        if seed == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(seed)
        return {"method": 2.0 + seed, "control": 1.0}

    written["toy.one"] = make(run, seeds=3)
    with pytest.raises(KeyboardInterrupt):
        reproduce(["toy.one"], tmp_path)
    return done


def test_unseen_seeds_leave_the_kept_ones_of_the_claim(written, tmp_path):
    done = stopped_before_its_last_seed(written, tmp_path)
    reproduce(["toy.one"], tmp_path, seeds=[7, 8, 9])
    reproduce(["toy.one"], tmp_path)
    assert done == [0, 1, 7, 8, 9, 2] and not (tmp_path / "verdicts.partial.json").exists()


@pytest.mark.parametrize(
    ("seeds", "says"), [([2, 7, 0], "0, 2 are not unseen: 0 to 2 are the claim's own"), ([7, 8, 7], "7 twice")]
)
def test_seeds_are_unseen_and_given_once(written, tmp_path, seeds, says):
    with pytest.raises(LuthierError, match=says):
        reproduce(["toy.one"], tmp_path, seeds=seeds)


def test_a_budget_runs_unseen_seeds_that_are_due(written, tmp_path):
    reproduce(["toy.one"], tmp_path)
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[7, 8, 9], budget=100.0)
    assert record["unseen"]["seeds"] == [7, 8, 9]
    assert reproduce(["toy.one"], tmp_path, seeds=[7, 8, 9], budget=100.0) == []
    (record,) = reproduce(["toy.one"], tmp_path, seeds=[10], budget=100.0)
    assert record["unseen"]["seeds"] == [7, 8, 9, 10]


def test_a_stopped_claim_goes_on_at_the_next_seed(written, tmp_path):
    done = stopped_before_its_last_seed(written, tmp_path)
    assert done == [0, 1] and not (tmp_path / "verdicts.json").exists()
    done.append("stopped")
    (record,) = reproduce(["toy.one"], tmp_path)
    assert done == [0, 1, "stopped", 2] and list(record["observations"]) == ["0", "1", "2"]
    assert not (tmp_path / "verdicts.partial.json").exists()


def test_what_was_kept_of_another_source_is_not_used(written, tmp_path):
    def run(seed, ctx):
        if seed == 1 and not changed:
            raise KeyboardInterrupt
        return {"method": 5.0 if changed else 2.0, "control": 1.0}

    changed = []
    written["toy.one"] = make(run, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        reproduce(["toy.one"], tmp_path)
    (tmp_path / "claims" / "toy_one.py").write_text("CLAIM = 1\n")
    changed.append(1)
    (record,) = reproduce(["toy.one"], tmp_path)
    assert [o["method"] for o in record["observations"].values()] == [5.0, 5.0]


def test_a_budget_runs_what_is_due_shortest_first_and_says_what_is_left(written, tmp_path):
    ran, events = [], []

    def noted(name):
        return lambda seed, ctx: (ran.append(name), {"method": 2.0, "control": 1.0})[1]

    written["toy.one"] = make(noted("one"), seeds=2, minutes=1.0)
    written["toy.far"] = make(noted("far"), id="toy.far", seeds=2, minutes=100.0)
    rows = reproduce(["toy.far", "toy.one"], tmp_path, watch=events.append, budget=100.0)
    assert ran == ["one", "one"] and [r["id"] for r in rows] == ["toy.one"]
    assert events[-1] == {"kind": "left", "ids": ["toy.far"]}
    assert [e["step"] for e in events if e["kind"] == "progress"] == ["toy.one"], "only what runs is announced"
    assert reproduce(["toy.one"], tmp_path, budget=100.0) == [] and ran == ["one", "one"], "its verdict is current"
    (tmp_path / "claims" / "toy_one.py").write_text("CLAIM = 1\n")
    reproduce(["toy.one"], tmp_path, budget=100.0)
    assert ran == ["one"] * 4
    reproduce(["toy.far"], tmp_path, budget=4000.0)
    assert ran[4:] == ["far", "far"]


def test_same_seed_same_randomness(written, tmp_path):
    """A claim sees a context keyed by its id and seed, and a cache that is gone afterwards."""
    folders = []

    def run(seed, ctx):
        folders.append(ctx.cache)
        return {"method": torch.rand(1, generator=ctx.rng("x")).item(), "control": 0.0}

    written["toy.one"] = make(run, effect=0.0)
    first, again = (reproduce(["toy.one"], tmp_path) for _ in range(2))
    assert first[0]["observations"] == again[0]["observations"]
    assert first[0]["observations"]["0"] != first[0]["observations"]["1"]
    assert not any(f.exists() for f in folders)


def test_one_broken_claim_does_not_lose_the_others(written, tmp_path):
    written["toy.far"] = make(lambda seed, ctx: 1 / 0, id="toy.far")
    with pytest.raises(LuthierError, match=r"1 claims could not be run: toy.far \(ZeroDivisionError"):
        reproduce(["toy.far", "toy.one"], tmp_path)
    assert [r["id"] for r in _reproduce.read(tmp_path)] == ["toy.one"]


def test_unknown_claims_are_named():
    with pytest.raises(LuthierError, match="unknown claim"):
        package.claim("merge.nothing")
    with pytest.raises(LuthierError, match="at least"):
        make(seeds=0)


@pytest.mark.parametrize("id_", package.claims())
def test_claims_are_well_formed(id_):
    one = package.claim(id_)
    assert one.id == id_
    assert one.sentence.endswith(".") and "\n" not in one.sentence
    assert one.control and one.unit
    assert one.minutes > 0
