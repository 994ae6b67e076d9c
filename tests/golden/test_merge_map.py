"""MAP on objectives that are known functions of the scales; numbers of the released code (luli-git/MAP 7d871dc)."""

import itertools
import json
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from luthier.errors import LuthierError
from luthier.flows import Space
from luthier.kit.context import Context
from luthier.kit.front import fitted, front
from luthier.merge.map import Course, Map
from luthier.testing.judged import search

TWO = Space(2, (2, 2))
# 10 vectors of scales, a made-up loss and accuracy of each: what `fit_quadratic_from_json` was run on.
SCALES = [[1, 0], [0, 1], [.5, .5], [.25, .75], [.75, .5], [.2, .1], [.9, .8], [.4, .9], [0, 0], [.6, .2]]  # fmt: skip
LOSSES = [1.437256, 1.520606, 1.345432, 1.375578, 1.365374, 1.667051, 1.382754, 1.285065, 1.9, 1.418942]
ACCURACIES = [0.863521, 0.164032, 0.436221, 0.341066, 0.685283, 0.459431, 0.682268, 0.284862, 0.37, 0.589956]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def bowls(candidate):
    """Two losses of two scales, lowest at (0.8, 0.3) and (0.2, 0.6)."""
    a, b = candidate.weights
    return 1 + (a - 0.8) ** 2 + 2 * (b - 0.3) ** 2, 2 + 3 * (a - 0.2) ** 2 + (b - 0.6) ** 2


BASE = (1 + 0.64 + 0.18, 2 + 0.12 + 0.36)


def mapped(trials=20, judge=bowls, objectives=("x nll", "y nll"), base=BASE, space=TWO, folder=None, seed=0, **fields):
    return search(Map(**fields), judge, objectives, base, trials, space, seed, folder)


@cache
def usual():
    return mapped()


def scales(done):
    return [json.loads(d.candidate)["set"]["weights"] for d in done]


@pytest.mark.parametrize(
    ("values", "link", "theirs"),
    [
        (LOSSES, "identity", [0.852514, 0.004213, 0.396183, -1.312337, -0.414983, 1.911932]),
        (LOSSES, "softplus", [1.084545, -0.014514, 0.473306, -1.654296, -0.4938, 1.755914]),
        (ACCURACIES, "sigmoid", [2.166992, -1.398777, -0.004216, 0.109408, 0.317093, -0.445896]),
    ],
)
def test_fits_are_the_released_codes(values, link, theirs):
    assert fitted(tensor(SCALES), tensor(values), link).tolist() == pytest.approx(theirs, abs=2e-5)


def test_a_wrong_share_is_an_accuracy_the_other_way_round():
    wrong = fitted(tensor(SCALES), 1 - tensor(ACCURACIES), "sigmoid")
    assert wrong.tolist() == pytest.approx((-fitted(tensor(SCALES), tensor(ACCURACIES), "sigmoid")).tolist(), abs=1e-6)


def test_released_code_fits_accuracies_for_losses():
    """Its `fit_quadratic_functions` with the link of `loss`, on results that hold both LOSSES and ACCURACIES."""
    theirs = [0.858585, -1.258058, 0.56738, 0.202707, 0.291681, -0.738594]
    assert fitted(tensor(SCALES), tensor(ACCURACIES), "softplus").tolist() == pytest.approx(theirs, abs=2e-5)
    assert fitted(tensor(SCALES), tensor(LOSSES), "softplus").tolist() != pytest.approx(theirs, abs=0.5)


def test_the_preferred_point_is_the_released_codes():
    """`get_scaling_from_pf` on three values of which less is better."""
    values = [(0.2, 0.9), (0.4, 0.5), (0.8, 0.3)]
    assert [Map(preference=w).pick(values) for w in ((0.25, 0.75), (0.7, 0.3), (0.5, 0.5))] == [2, 0, 1]


def test_grids_are_the_released_codes():
    """`generate_adjusted_nd_points` before it draws: for 10 points of 2 scales 16 to draw from, for 17 of 3, 51."""
    quarters = [(a / 4, b / 4) for a, b in itertools.product(range(5), repeat=2) if a + b != 4 and a != b]
    found = Map().samples(12, 2, Context())[2:].tolist()
    assert len(quarters) == 16 and len(found) == len({tuple(x) for x in found}) == 10
    assert all(tuple(x) in quarters for x in found)
    thirds = Map().samples(20, 3, Context())[3:] * 3
    assert torch.allclose(thirds, thirds.round()) and len(thirds) == len({tuple(x) for x in thirds.tolist()}) == 17
    assert not any(round(sum(x)) == 3 or len({round(v) for v in x}) == 1 for x in thirds.tolist())


def test_samples_by_the_fields():
    method = Map(isotropic=0.5, onehot=0.25, disturb=0.01, rest="uniform")
    x = method.samples(3 + 20, 3, Context(step="s"))
    assert x[:3].tolist() == torch.eye(3).tolist() and x.shape == (23, 3) and x.min() >= 0 and x.max() <= 1
    alike = [max(row) - min(row) for row in x[3:].tolist()]
    assert alike[:5] == [0] * 5 and all(0 < d < 0.1 for d in alike[5:10])
    plain = {round(row[0], 6) for row in x[3:8].tolist()}
    assert len(plain) == 5 and all(min(abs(row[0] - p) for p in plain) < 0.06 for row in x[8:13].tolist())
    alone = [sorted(row) for row in x[13:18].tolist()]
    assert all(a < 0.06 and b < 0.06 and c > 0.94 for a, b, c in alone) and len({max(r) for r in alone}) > 1
    assert all(max(row) - min(row) > 0.02 and sorted(row)[1] > 0.06 for row in x[18:].tolist()[:1])
    assert not torch.equal(x[3:], method.samples(23, 3, Context(seed=1, step="s"))[3:])
    odd = Map(isotropic=1.0).samples(1 + 5, 1, Context())
    assert odd.shape == (6, 1) and odd[0] == 1
    assert Map().samples(2, 3, Context()).tolist() == [[1, 0, 0], [0, 1, 0]]
    lonely = Map().samples(4, 1, Context())[1:, 0]  # one scale has no grid without diagonal
    assert len(set(lonely.tolist())) == 3


def test_one_that_is_disturbed():
    """Of two samples with one scale for all, one is disturbed, and there is but one it can stand beside."""
    for seed in range(12):
        x = Map(isotropic=1.0, disturb=1e-3).samples(2 + 2, 2, Context(seed=seed))
        assert x[2, 0] == x[2, 1] and 0 < (x[3] - x[2]).abs().max() < 0.01


def test_a_grid_is_made_for_what_is_left():
    """Half of twenty samples come from elsewhere: the grid is the one for ten, of quarters, and any of its points."""
    drawn = [Map(isotropic=0.5).samples(22, 2, Context(seed=seed))[12:] for seed in range(4)]
    assert all(torch.equal(x * 4, (x * 4).round()) and len(x) == 10 for x in drawn)
    firsts = [(0.0, 0.0), (0.0, 0.25)]
    assert not all(tuple(x[i].tolist()) == firsts[i] for x in drawn for i in (0, 1))
    assert len({tuple(map(tuple, x.tolist())) for x in drawn}) == 4
    assert set(Map().samples(3 + 3, 3, Context())[3:].flatten().tolist()) == {0.0, 1.0}  # six points need two steps


def test_scales_stay_within_the_range():
    """0.15 + (0.45 - 0.15) is above 0.45 in floats."""
    assert 0.15 + (0.45 - 0.15) > 0.45
    _, done = mapped(low=0.15, high=0.45)
    assert scales(done)[0] == [0.45, 0.15] and max(map(max, scales(done))) == 0.45


def test_what_suits_a_loss_of_zero():
    """A loss may be 0; what is negative somewhere is none."""
    evaluate = SimpleNamespace(finished=[], objectives=("x nll",), base=None)
    course = Course(Map(), 2, 20, evaluate, Context())
    assert course._link("x nll", tensor([0.0, 1.0])) == "softplus"
    assert course._link("x nll", tensor([-0.1, 1.0])) == "identity"


def test_experts_alone_and_no_other_merge_set_the_reference():
    def judge(candidate):
        return bowls(candidate) if sorted(candidate.weights) == [0, 1] else (90.0, 90.0)

    table, done = mapped(judge=judge)
    worst = [max(v) for v in zip(BASE, done[0].values, done[1].values, strict=True)]
    assert table.notes[0].endswith(f"each expert alone (x nll {worst[0]:.4g}, y nll {worst[1]:.4g})")


def test_how_far_predictions_were_off():
    """The mean over the points of the front that were judged, from the columns of the table."""
    table, _ = mapped(verify=6)
    rows = table.dicts()[15:]
    means = [math.fsum(abs(r[f"predicted {n}"] - r[n]) for r in rows) / 6 for n in ("x nll", "y nll")]
    assert table.notes[1] == f"off by, on 6 points of the predicted front: x nll {means[0]:.3g}, y nll {means[1]:.3g}"
    assert min(means) > 1e-4


def test_the_first_look_is_at_the_preferred_point():
    _, done = mapped(preference=(1.0, 0.0), verify=6)
    cost = [d.values[0] for d in done]
    assert cost.index(min(cost)) == 14
    assert Map().to_dict()["set"]["disturb"] == 0.1


def test_quadratics_are_foretold_exactly_and_their_front_is_judged():
    table, done = mapped(link="identity", verify=6)
    rows = table.dicts()
    assert len(rows) == 21 and len(done) == 20 and rows[0]["predicted x nll"] is None
    for row in rows[1:]:
        assert row["predicted x nll"] == pytest.approx(row["x nll"], abs=1e-9)
        assert row["predicted y nll"] == pytest.approx(row["y nll"], abs=1e-9)
    # On the front the gradients point against each other: 2(a - .8) * 2(b - .6) = 4(b - .3) * 6(a - .2).
    for a, b in scales(done)[14:]:
        assert 0.19 < a < 0.81 and 0.29 < b < 0.61
        assert 4 * (a - 0.8) * (b - 0.6) == pytest.approx(24 * (b - 0.3) * (a - 0.2), abs=0.12)
    ends = [min(d.values[i] for d in done[14:]) for i in (0, 1)]
    assert ends == [pytest.approx(1, abs=1e-3), pytest.approx(2, abs=1e-3)]
    optimal = front([d.values for d in done])
    assert [i for i, row in enumerate(rows[1:]) if row["front"]] == optimal and len(optimal) >= 6
    assert "off by, on 6 points of the predicted front: x nll " in table.notes[1] and len(table.notes) == 2
    assert all(float(word.split()[-1]) < 1e-9 for word in table.notes[1].split(": ")[1].split(", "))


def test_links_by_metric():
    def judge(candidate):
        a, b = candidate.weights
        z = 0.5 * a * a - a + 0.3 * a * b - 0.6 * b + 0.2
        return 1 / (1 + math.exp(-z)), math.log1p(math.exp(z)), z

    names = ("x accuracy", "x nll", "x gain")
    plain, _ = mapped(judge=judge, objectives=names, base=(0.5, 0.7, 0.2), link="identity")
    table, _ = mapped(judge=judge, objectives=names, base=(0.5, 0.7, 0.2))
    off = lambda t, n: max(abs(r[f"predicted {n}"] - r[n]) for r in t.dicts()[1:])
    assert all(off(table, n) < 1e-6 for n in names) and off(plain, "x gain") < 1e-9
    assert off(plain, "x accuracy") > 1e-4 and off(plain, "x nll") > 1e-4


def test_the_fairest_or_the_preferred_model_is_chosen():
    table, done = usual()
    values = [d.values for d in done]
    best = [values[i] for i in front(values)]
    low, high = ([f(v[i] for v in best) for i in (0, 1)] for f in (min, max))
    regret = [max((v[i] - low[i]) / (high[i] - low[i]) for i in (0, 1)) for v in best]
    chosen = table.where(chosen=True)[0]
    assert (chosen["x nll"], chosen["y nll"]) == best[regret.index(min(regret))]
    for weights in ((1.0, 0.0), (0.2, 3.0)):
        table, done = mapped(preference=weights)
        cost = [weights[0] * d.values[0] + weights[1] * d.values[1] for d in done]
        chosen = table.where(chosen=True)[0]
        assert weights[0] * chosen["x nll"] + weights[1] * chosen["y nll"] == min(cost)
        assert cost.index(min(cost)) == 12  # the first look at the predicted front


def test_the_hypervolume_is_before_the_worst_of_base_and_experts():
    table, done = usual()
    assert scales(done)[:2] == [[1.0, 0.0], [0.0, 1.0]]
    worst = [max(v) for v in zip(BASE, done[0].values, done[1].values, strict=True)]
    height, volume = worst[1], 0.0
    for x, y in sorted(d.values for d in done if d.values[0] < worst[0]):
        if y < height:
            volume, height = volume + (worst[0] - x) * (height - y), y
    said = (
        f"front: {sum(r['front'] or False for r in table.dicts())} of 20 merges, hypervolume {volume:.4g} (predicted "
    )
    assert table.notes[0].startswith(said)
    hoped = float(table.notes[0].split("(predicted ")[1].split(")")[0])
    assert hoped == pytest.approx(volume, rel=0.05)
    assert table.notes[0].endswith(f"each expert alone (x nll {worst[0]:.4g}, y nll {worst[1]:.4g})")


def test_fewer_trials_than_experts():
    """The reference is before those alone that were judged, and says so."""
    table, done = mapped(trials=1)
    worst = [max(v) for v in zip(BASE, done[0].values, strict=True)]
    alone = f"before the worst of the base and of 1 of 2 experts alone (x nll {worst[0]:.4g}, y nll {worst[1]:.4g})"
    assert alone in table.notes[0]


def test_scales_are_mapped_to_the_range():
    _, done = mapped(low=-0.5, high=1.5, verify=2)
    inside, _ = mapped(verify=2)
    assert scales(done)[:2] == [[1.5, -0.5], [-0.5, 1.5]]
    assert {min(c) for c in scales(done)} | {max(c) for c in scales(done)} >= {-0.5, 1.5}
    _, narrow = mapped(low=0.5, high=0.5)
    assert {tuple(c) for c in scales(narrow)} == {(0.5, 0.5)}


def test_the_nested_merge_gets_the_scales():
    _, done = mapped(trials=4, merge={"use": "merge.ties", "set": {"density": 0.5}})
    assert json.loads(done[0].candidate)["use"] == "merge.ties"
    assert json.loads(done[0].candidate)["set"]["density"] == 0.5


@pytest.mark.parametrize("after", [3, 15, 17])
def test_a_search_that_breaks_goes_on_as_it_was(tmp_path, after):
    seen = []

    def breaks(candidate):
        seen.append(candidate)
        if len(seen) > after:
            raise KeyboardInterrupt
        return bowls(candidate)

    with pytest.raises(KeyboardInterrupt):
        mapped(judge=breaks, folder=tmp_path)
    again, _ = mapped(folder=tmp_path)
    assert again == usual()[0]


def test_a_shared_search_predicts_from_what_is_finished():
    """Others may have samples in hand when the first point of the front is asked for."""
    trials = [SimpleNamespace(ordinal=-1, params={}, values=(0.0, 0.0))]
    evaluate = SimpleNamespace(finished=trials, objectives=("x nll", "y nll"), base=None)
    course = Course(Map(link="identity"), 2, 20, evaluate, Context())
    assert len(course) == 20 and course[12] == course[0] and course[13] == course[1] != course[0]
    for i in range(8):
        values = bowls(SimpleNamespace(weights=tuple(course[i].values())))
        trials.append(SimpleNamespace(ordinal=i, params=course[i], values=values))
    early = course[12]
    assert course[12] == early != course[0]
    for i in range(8, 12):
        trials.append(SimpleNamespace(ordinal=i, params=course[i], values=(float(i), -float(i))))
    assert course[12] != early


def test_budgets_too_small_for_a_quadratic():
    for trials in (1, 3):
        table, done = mapped(trials=trials, verify=5)
        assert len(done) == trials
        assert table.notes[-1] == f"{trials - trials // 2} samples are fewer than the 6 coefficients of a quadratic"
    assert len(mapped(trials=12)[0].notes) == 2


def test_as_many_points_of_the_front_are_judged_as_asked():
    for verify, expected in ((1, 1), (4, 4), (30, 10)):
        table, done = mapped(verify=verify)
        assert f"on {expected} points of the predicted front" in table.notes[1]
        grid = [c for c in scales(done)[2 : 20 - expected] if sum(c) == pytest.approx(1)]
        assert not grid and len(done) == 20


def test_three_experts_and_three_objectives():
    ends = torch.tensor([[0.9, 0.1, 0.2], [0.1, 0.8, 0.3], [0.2, 0.2, 0.7]], dtype=torch.float64)

    def judge(candidate):
        return [1 + ((tensor(candidate.weights) - end) ** 2).sum().item() for end in ends]

    base = [1 + (end**2).sum().item() for end in ends]
    table, done = mapped(27, judge, ("a nll", "b nll", "c nll"), base, Space(2, (2, 2, 2)), verify=7, link="identity")
    flat = torch.cat([ends, torch.ones(3, 1)], dim=1).T  # scales as a mixture of the three best ones
    judged = torch.cat([tensor(scales(done)[20:]), torch.ones(7, 1)], dim=1).T
    shares = torch.linalg.lstsq(flat, judged).solution
    assert shares.min() > -0.1 and shares.max() < 1.1
    assert torch.allclose(flat @ shares, judged, atol=0.1) and "hypervolume" in table.notes[0]


def test_errors():
    with pytest.raises(LuthierError, match="merge.map.preference.*has 3 weights for 2 objectives.*weigh x nll, y nll"):
        mapped(preference=(1, 1, 1))
    Map(preference=(1, 1, 1)).fits(TWO)  # before it is known what is measured
    with pytest.raises(LuthierError, match="0.7 is above 0.5"):
        Map(low=0.7, high=0.5)
    with pytest.raises(LuthierError, match="over 1 together"):
        Map(isotropic=0.6, onehot=0.5)
    with pytest.raises(LuthierError, match="merge.map.merge.*has no weights"):
        Map(merge="merge.slerp")
