"""The network that scores candidates: equivariant, reproducible, and taught what it is asked for."""

import numpy as np
import pytest
import torch

from luthier.engine import drawn
from luthier.errors import LuthierError
from luthier.kit import lattice, predictor, predictor_fit
from luthier.kit.context import Context
from luthier.kit.planted import Planting, generator, plant, task
from luthier.kit.polynomial import Polynomial, graded
from luthier.kit.predictor import Sizes

SMALL = Sizes(16, 2, 4, 24)


def training(seed=0, steps=3, task=None, **fit):
    return predictor_fit.Training(predictor_fit.Fit(steps=steps, sizes=SMALL, **fit), seed, task)


def fitted(asked, **context):
    return Context(**context).fitted("predictor", {}, asked)


@pytest.fixture(scope="module")
def network():
    return training().network().eval()


@pytest.fixture(scope="module")
def problem():
    made = plant(Planting(n=4, half=3, size=12, matrix="block", coercive=True), generator(3))
    return made.polynomial, [tuple(row) for row in predictor_fit.candidates(made, True, 3).tolist()]


def renamed(p, order):
    terms = tuple((tuple(e[i] for i in order), c) for e, c in p.terms)
    return Polynomial(p.variables, terms)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_renaming_variables_renames_the_scores(network, problem, order):
    p, candidates = problem
    plain = dict(zip(candidates, predictor.scores(network, p, candidates), strict=True))
    moved = [tuple(a[i] for i in order) for a in candidates]
    shuffled = [moved[i] for i in np.random.default_rng(1).permutation(len(moved))]
    other = dict(zip(shuffled, predictor.scores(network, renamed(p, order), shuffled), strict=True))
    assert max(abs(plain[a] - other[tuple(a[i] for i in order)]) for a in candidates) < 1e-5
    assert max(plain.values()) - min(plain.values()) > 1e-3  # and it does not say the same of all


def test_the_shipped_network_is_equivariant_too(problem):
    p, candidates = problem
    shipped = predictor.shipped("neural_sos")
    plain = predictor.scores(shipped, p, candidates)
    order = (2, 0, 3, 1)
    moved = [tuple(a[i] for i in order) for a in candidates]
    assert np.allclose(plain, predictor.scores(shipped, renamed(p, order), moved), atol=1e-5)


def test_padding_and_scale_change_nothing(network, problem):
    p, candidates = problem
    terms, rows = np.array(p.support), np.array(candidates)
    numbers = np.array([float(c) for _, c in p.terms])
    one = predictor.features(terms, numbers, rows)
    large = predictor.features(terms, 1000 * numbers, rows)
    assert np.allclose(one[0], large[0], atol=1e-6) and np.allclose(one[1], large[1], atol=1e-6)
    few = predictor.features(terms, numbers, rows[:7])
    with torch.no_grad():
        alone, both = network(*predictor.batch([few]))[0], network(*predictor.batch([one, few]))[1, :7]
    assert torch.allclose(alone, both, atol=1e-5)


def test_features_by_hand():
    """p = 4 x^4 - x^2 y + y^2 over x^2, x, y. Sums: x^4, x^3, x^2 y, x^2, x y, y^2, of one pair each."""
    terms, rows = np.array([[4, 0], [2, 1], [0, 2]]), np.array([[2, 0], [1, 0], [0, 1]])
    token, pair = predictor.features(terms, np.array([4.0, -1.0, 1.0]), rows)
    hits = pair[..., 0]
    assert hits.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert pair[0, 2].tolist() == [1, 0.5, -0.5, 0.5, 0.5]  # the root of 1/4 with its sign; the pair in two orders
    assert token[0, :4].tolist() == [1, 1, 1, 1]
    assert np.allclose(token[:, 4], hits.mean(axis=1))
    assert token[:, -2].tolist() == [pytest.approx(1 / 3), -1, pytest.approx(1 / 3)]
    assert token[:, -3].tolist() == [1, 0.5, 0.5]


def test_pairs_that_share_a_sum_share_it():
    """1, x, x^2: x^2 is 1 * x^2 and x * x; of x^2's own square there is one pair."""
    _, pair = predictor.features(np.array([[2], [4]]), np.ones(2), np.array([[0], [1], [2]]))
    assert pair[1, 1, 4] == pair[0, 2, 4] == pytest.approx(1 / 3)  # (0, 2), (1, 1), (2, 0)
    assert pair[2, 2, 4] == 1


def test_the_same_seed_gives_the_same_weights_and_another_others():
    first, again, other = (fitted(training(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    state = torch.get_rng_state()
    fitted(training(1))
    assert torch.equal(state, torch.get_rng_state())


def test_weights_tell_their_sizes(network, problem):
    p, candidates = problem
    again = predictor.from_tensors(network.state_dict())
    assert predictor.scores(again, p, candidates) == predictor.scores(network, p, candidates)


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(drawn, "LOG_EVERY", 1)
    told = []
    fitted(training(steps=40, lr=5e-3), watch=told.append)
    losses = [e["train"]["loss"] for e in told if e["kind"] == "metrics"]
    assert len(losses) == 40 and np.mean(losses[-8:]) < 0.75 * np.mean(losses[:8])


def test_a_step_is_one_of_torch(monkeypatch):
    """Three steps written out: AdamW, the norm clipped at 1, a linear rise over the first step and then a cosine."""
    asked = training(steps=3, lr=0.01, warmup=0.4)
    other, rates = asked.network(), (0.01 / 1.2, 0.01 * 0.5 * (1 - np.cos(np.pi * (2 / 3) / 0.6)), None)
    monkeypatch.setattr(drawn, "LOG_EVERY", 1)
    told = []
    made = fitted(asked, watch=told.append)
    given = [e["train"]["lr"] for e in told if e["kind"] == "metrics"]
    assert given[0] == pytest.approx(rates[0]) and 0 < given[2] < given[1] <= 0.01
    optimizer = torch.optim.AdamW(other.parameters(), lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    for step, lr in enumerate(given):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        asked.loss(other, asked.batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    biases = ("bias.0.bias", "bias.1.bias")  # the same for all pairs of a head: their gradient is rounding alone
    assert all(torch.allclose(made[n], p, atol=1e-5) for n, p in other.named_parameters() if n not in biases)


def test_a_killed_training_goes_on_where_it_was_saved(monkeypatch, tmp_path):
    """To the same bits, with nothing left behind; a save of another training is not taken for its own."""
    monkeypatch.setattr(drawn, "SAVE_EVERY", 2)
    asked, steps = training(steps=6), []

    def dies(event):
        if event["kind"] == "progress" and event["done"] == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fitted(asked, cache=tmp_path, watch=dies)
    (saves,) = tmp_path.iterdir()
    assert sorted(p.name for p in saves.iterdir()) == ["step-00000002", "step-00000004"]
    with pytest.raises(LuthierError, match="saved by a run with another"):
        fitted(training(seed=1, steps=6), cache=tmp_path)
    made = fitted(asked, cache=tmp_path, watch=lambda e: steps.append(e["done"]) if e["kind"] == "progress" else None)
    whole = fitted(asked)
    assert steps == [5, 6] and all(torch.equal(made[k], whole[k]) for k in whole)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


def test_examples_are_labelled_with_their_basis():
    for seed in range(12):
        token, pair, label = predictor_fit.example(3, 3, generator(seed))
        assert len(token) == len(pair) == len(label)
        assert 0 < label.sum() <= len(label) <= 20


def test_every_gradient_arrives(network):
    training().loss(network, training().batch(0)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_candidates_of_a_paper_like_one_are_consistent():
    made = plant(Planting(n=3, half=3, size=5), generator(8))
    rows = [tuple(r) for r in predictor_fit.candidates(made, False, 3).tolist()]
    assert rows == graded(rows)
    assert set(map(tuple, made.basis.tolist())) <= set(rows)


@pytest.mark.parametrize("name", ["n6-d12-m30-block", "n8-d6-m20-sparse-clique", "n100-d10-m20-block"])
def test_a_step_of_a_published_setting(name, network):
    """All its polynomials are drawn as the setting says, and their planted monomials are the ones to be found."""
    asked = training(task=task(name))
    batch = asked.batch(0)
    keep, labels = batch["attention_mask"], batch["labels"]
    assert 2 <= len(labels) <= predictor_fit.MOST and all(torch.isfinite(batch[k]).all() for k in ("token", "pair"))
    rng, found = generator(0, 0), []
    while len(found) < len(labels):
        made = plant(task(name), rng)
        rows = lattice.possible(made.polynomial)
        if rows is not None and len(rows) <= predictor_fit.CANDIDATES:
            found.append((len(rows), len(set(made.hidden) & set(rows))))
    assert [(int(k.sum()), int(label.sum())) for k, label in zip(keep, labels, strict=True)] == found
    asked.loss(network, batch).backward()
    network.zero_grad()


def test_a_setting_that_leaves_too_many_candidates(monkeypatch):
    monkeypatch.setattr(predictor_fit, "CANDIDATES", 5)
    with pytest.raises(LuthierError, match="leaves at most 5 candidates"):
        training(task=task("n4-d12-m30-dense")).batch(0)
