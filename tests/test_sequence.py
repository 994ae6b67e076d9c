"""The sequence form: what it reads and writes, votes named back, training that is keyed."""

import numpy as np
import pytest
import torch

from luthier.engine import drawn
from luthier.errors import LuthierError
from luthier.kit import sequence, sequence_fit
from luthier.kit.context import Context
from luthier.kit.planted import generator, task
from luthier.kit.polynomial import polynomial
from luthier.kit.predictor import Sizes
from luthier.kit.predictor_fit import Fit, keyed
from luthier.sos.neural_sos import NeuralSos

SMALL = Sizes(16, 2, 8, 24)
TRAINING = sequence_fit.Training(Fit(steps=1, sizes=SMALL), 0)


@pytest.fixture(scope="module")
def network():
    return keyed(lambda: sequence.Sequence2Basis(SMALL), 0).eval()


def test_terms_stand_in_lexicographic_order_with_signed_roots():
    rows, values = sequence.source(np.array([[0, 2], [2, 1], [2, 0]]), np.array([4.0, -1.0, 1.0]))
    assert rows[:, :2].tolist() == [[2, 1], [2, 0], [0, 2]]
    assert rows[:, 2:].sum() == 0
    assert values.tolist() == [-0.5, 0.5, 1.0]


def test_a_monomial_is_the_sum_of_its_exponents(network):
    row = torch.tensor([[[2, 1, 0, 0, 0, 0, 0, 0]]])
    by_hand = sum(network.monomial.weight[i * sequence.EXPONENTS + e] for i, e in enumerate(row[0, 0].tolist()))
    assert torch.allclose(network.embedded(row)[0, 0], by_hand, atol=1e-6)


@torch.no_grad()
def test_what_is_written_depends_on_what_stands_before_it_alone(network):
    inputs = sequence_fit.joined([sequence_fit.example(3, 2, generator(1))])
    target = inputs["labels"]
    memory = network.read(inputs["rows"], inputs["values"], inputs["attention_mask"])
    whole, ends = network.written(memory, inputs["attention_mask"], target)
    for count in range(target.shape[1]):
        part, end = network.written(memory, inputs["attention_mask"], target[:, :count])
        assert torch.allclose(part[:, -1], whole[:, count], atol=1e-5)
        assert torch.allclose(end[:, -1], ends[:, count], atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(network):
    one, two = (sequence_fit.example(3, half, generator(half)) for half in (2, 3))
    alone, both = sequence_fit.joined([one]), sequence_fit.joined([one, two])
    first, targets = alone["labels"], both["labels"]
    single, joint = (
        network.written(network.read(b["rows"], b["values"], b["attention_mask"]), b["attention_mask"], target)
        for b, target in ((alone, first), (both, targets))
    )
    assert torch.allclose(single[0][0], joint[0][0, : first.shape[1] + 1], atol=1e-5)


def test_votes_are_named_back(monkeypatch):
    """A stand-in that writes the first variable: under each renaming that is another one."""
    monkeypatch.setattr(sequence, "greedy", lambda network, p: [(1, 0, 0), p.support[0]])
    p = polynomial("x^4 + y^2 + z^2 + x*y*z")
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    assert sequence.votes(None, p, orders) == [[a, (4, 0, 0)] for a in ((1, 0, 0), (0, 0, 1), (0, 1, 0))]


def test_training_is_keyed_and_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(drawn, "LOG_EVERY", 1)
    told = []
    fit = Fit(steps=30, lr=1e-2, sizes=SMALL)
    first, again, other = (
        Context(watch=watch).fitted("sequence", {}, sequence_fit.Training(fit, seed))
        for seed, watch in ((1, told.append), (1, None), (2, None))
    )
    losses = [e["train"]["loss"] for e in told if e["kind"] == "metrics"]
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["ends.weight"], other["ends.weight"])
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


def test_a_basis_can_be_learnt_by_heart():
    """One polynomial, over and over: then greedy decoding writes its planted basis, in order, and stops."""
    rows, values, target = sequence_fit.example(3, 2, generator(5))
    batch = sequence_fit.joined([(rows, values, target)])
    network = keyed(lambda: sequence.Sequence2Basis(SMALL), 0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(80):
        loss = TRAINING.loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = polynomial(
        {tuple(r[:3]): float(np.sign(v) * v**2) for r, v in zip(rows.tolist(), values.tolist(), strict=True)}
    )
    assert sequence.greedy(network, p) == [tuple(row[:3]) for row in target.tolist()]


def test_every_gradient_arrives(network):
    TRAINING.loss(network, TRAINING.batch(0)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_weights_tell_their_sizes(network):
    p = polynomial("x^4 + y^4 + x*y + 1")
    again = sequence.from_tensors(network.state_dict())
    assert sequence.greedy(again, p) == sequence.greedy(network, p)


def test_what_does_not_fit_is_told():
    assert sequence.fits(polynomial("x^16 + y"))
    assert not sequence.fits(polynomial("x^17 + y"))
    assert not sequence.fits(polynomial("+".join(f"x{i}^2" for i in range(9))))


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("(x^3 + y^3 - 2)^2 + (y^3 + x)^2 + x^6 + y^6 + x^2/3 + 1/5", "exact"),
        ("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1 + x^6/1000 + y^6/1000", "not_sos"),
        ("+".join(f"x{i}^2" for i in range(9)), "exact"),
    ],
)
def test_verdicts_hold_after_one_step_of_training(text, status, tmp_path):
    found = NeuralSos(form="sequence", steps=1).certify(text, Context(cache=tmp_path))
    assert (found.status, found.refusal()) == (status, None)


def test_a_step_of_a_published_setting():
    fit = Fit(steps=2, sizes=SMALL)
    batch = sequence_fit.Training(fit, 0, task("n8-d4-m10-lowrank")).batch(0)
    target, rows = batch["labels"], batch["rows"]
    assert len(target) == sequence_fit.BATCH and rows.shape[:2] == batch["values"].shape
    assert target.sum(-1).max() == 2 and rows.sum(-1).max() == 4
    weights = [
        Context().fitted("sequence", {}, sequence_fit.Training(fit, 0, task(name)))["ends.weight"]
        for name in ("n8-d4-m10-lowrank", "n8-d4-m10-lowrank", "n8-d4-m10-lowrank-clique")
    ]
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:])


@pytest.mark.parametrize("name", ["n10-d12-m30-dense", "n8-d18-m10-dense"])
def test_settings_that_are_too_large_for_the_network(name):
    with pytest.raises(LuthierError, match="the form sequence reads 8 variables and exponents up to 16"):
        sequence_fit.Training(Fit(steps=1, sizes=SMALL), 0, task(name))
