"""sos.neural_sos on polynomials whose truth is known, whatever the network says."""

import dataclasses

import pytest
import torch

from luthier.errors import LuthierError
from luthier.kit import lattice, planted, predictor, predictor_fit, sequence, staged
from luthier.kit.context import Context
from luthier.kit.planted import STRUCTURES, Planting, generator, plant
from luthier.kit.polynomial import polynomial
from luthier.sos.neural_sos import NeuralSos

COERCIVE = "(x^3 + y^3 - 2)^2 + (y^3 - z^3 + x)^2 + (z^3 + 1)^2 + x^6 + y^6 + z^6 + x^2/3 + 1/5"
"""Five monomials are enough: 1, x and the cubes. Exact reduction leaves all 20 of degree 3 or less."""
NO_SUM = "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1 + x^6/1000 + y^6/1000"
"""Coercive; nonnegative where Motzkin's polynomial is; its functional holds for all ten monomials."""


def certify(problem, **fields):
    return NeuralSos(**fields).certify(problem, Context())


def test_a_coercive_polynomial_gets_its_five_monomials():
    found = certify(COERCIVE)
    assert (found.status, found.refusal()) == ("exact", None)
    assert set(found.basis) == {(3, 0, 0), (0, 3, 0), (0, 0, 3), (1, 0, 0), (0, 0, 0)}
    assert (found.numbers["complete"], found.numbers["programs"]) == (20, 1)


WRONG = {
    "everything": lambda network, p, candidates: [1.0] * len(candidates),
    "nothing": lambda network, p, candidates: [0.0] * len(candidates),
    "the opposite": lambda network, p, candidates: [1.0 - s for s in RIGHT(network, p, candidates)],
    "the last": lambda network, p, candidates: [i / len(candidates) for i in range(len(candidates))],
}
RIGHT = predictor.scores


@pytest.mark.parametrize("what", WRONG)
def test_no_verdict_depends_on_the_scores(what, monkeypatch):
    """Whatever the network says, what is true is found, and at most the bound is spent."""
    monkeypatch.setattr(predictor, "scores", WRONG[what])
    truths = {COERCIVE: "exact", NO_SUM: "not_sos", "x^4 - 3*x^2*y + 1": "not_sos", "x^4 + y^4 + x*y + 1": "exact"}
    for text, truth in truths.items():
        found = certify(text)
        assert (found.status, found.refusal()) == (truth, None), text
        most = staged.bound(1, 1.5, 3.0) * found.numbers["complete"] ** 3
        assert found.numbers["cubed"] <= most


def test_only_the_complete_basis_refutes():
    found = certify(NO_SUM)
    assert found.functional and len(found.basis) == found.numbers["complete"] == 10


@pytest.mark.parametrize("matrix", STRUCTURES)
def test_planted_ones_are_found(matrix):
    made = plant(Planting(n=4, half=3, size=10, matrix=matrix, coercive=True), generator(4))
    found = certify(made.polynomial)
    assert (found.status, found.refusal()) == ("exact", None)
    assert found.numbers["complete"] == 35
    assert found.numbers["basis"] <= 1.5 * len(made.hidden)


def test_a_network_made_anew_is_kept_for_the_run(tmp_path):
    told = []
    ctx = Context(cache=tmp_path, watch=told.append)
    first = NeuralSos(steps=2).certify(COERCIVE, ctx)
    steps = [e["done"] for e in told if e.get("what") == "train"]
    assert steps == [1, 2]
    again = NeuralSos(steps=2).certify(COERCIVE, ctx.with_(step="another"))
    assert [e["done"] for e in told if e.get("what") == "train"] == steps  # not trained again
    assert first == again and first.status == "exact"
    assert len(list(tmp_path.glob("predictor-*.safetensors"))) == 1


def test_a_network_of_one_published_setting(tmp_path):
    ctx = Context(cache=tmp_path)
    made = [NeuralSos(steps=2, task=task).certify(COERCIVE, ctx) for task in ("", "n4-d12-m30-dense")]
    assert {m.status for m in made} == {"exact"} and len(list(tmp_path.glob("predictor-*.safetensors"))) == 2
    with pytest.raises(LuthierError, match="no network is shipped that was trained on n4-d12-m30-dense alone"):
        NeuralSos(task="n4-d12-m30-dense")
    with pytest.raises(LuthierError, match="unknown setting of the published grid"):
        NeuralSos(task="n4", steps=2)


def test_too_many_candidates_for_the_network(monkeypatch):
    monkeypatch.setattr("luthier.sos.neural_sos.MOST", 3)
    monkeypatch.setattr(predictor, "scores", None)
    assert certify(COERCIVE).status == "exact"
    monkeypatch.setattr(lattice, "possible", lambda p: None)
    assert certify("x^4 + y^4 + x^2*y^2 + 1").status == "exact"
    left = certify("x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1")
    assert (left.status, left.reason) == (
        "unknown",
        "neither squares nor a proof against them",
    )  # corners refute nothing


def test_constants(recwarn):
    """Without variables there is one candidate, 1, and nothing to divide by."""
    assert [certify(text).status for text in ("7/3", "0", "-2")] == ["exact", "exact", "not_sos"]
    assert not recwarn.list


def test_constraints_are_not_looked_at():
    assert certify({"polynomial": "x", "nonneg": "x"}).reason == "there are constraints"


def test_the_shipped_weights_are_small_and_in_fp32():
    tensors = predictor.shipped("neural_sos").state_dict()
    assert sum(t.nbytes for t in tensors.values()) < 6_000_000
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    p = polynomial(COERCIVE)
    assert len(predictor.scores(predictor.shipped("neural_sos"), p, lattice.possible(p))) == 20


def test_defaults_are_these():
    assert NeuralSos().to_dict()["set"] == {
        "form": "candidates", "steps": 0, "task": "", "threshold": 0.5, "permutations": 4, "rho": 1.5, "faces": True,
        "bits": 40, "tolerance": 1e-8, "largest": 100, "seconds": None,
    }  # fmt: skip


def opened(monkeypatch, **fields):
    """The basis that is asked first, the candidates as they are ranked, and the complete basis."""
    seen = []
    real = staged.staged

    def spied(p, openings, ranking, complete, *rest):
        seen.append((openings[0], list(ranking()), list(complete)))
        return real(p, openings, ranking, complete, *rest)

    monkeypatch.setattr(staged, "staged", spied)
    NeuralSos(**fields).certify(COERCIVE, Context(seed=3))
    return seen[0]


def test_candidates_are_ranked_by_their_scores(monkeypatch):
    """Stand-in scores: the later in the list, the likelier. As many candidates as the network takes are no rule's."""
    monkeypatch.setattr("luthier.sos.neural_sos.MOST", 20)
    monkeypatch.setattr(predictor, "scores", lambda network, p, rows: [i / 100 for i in range(len(rows))])
    first, ranked, complete = opened(monkeypatch, threshold=0.15)
    assert ranked == complete[::-1] and set(first) >= set(complete[16:]) and len(first) < 20


def test_what_is_written_outside_the_candidates_is_left_out(monkeypatch):
    """A stand-in that writes x^2 and a monomial no square may hold; the votes put x^2 first."""
    monkeypatch.setattr(sequence, "greedy", lambda network, p: [(2, 0, 0), (4, 0, 0)])
    monkeypatch.setattr(sequence, "votes", lambda network, p, orders: [[(2, 0, 0), (4, 0, 0)]] * len(orders))
    monkeypatch.setattr(Context, "fitted", lambda self, name, key, training: {})
    monkeypatch.setattr(sequence, "from_tensors", lambda tensors: None)
    first, ranked, complete = opened(monkeypatch, form="sequence", steps=1)
    assert (2, 0, 0) in first and (4, 0, 0) not in first and sorted(ranked) == sorted(complete)
    others = [a for a in ranked if a not in first]
    assert ranked[: len(first)] == [a for a in ranked if a in first] and others  # what got votes comes first


def test_training_is_told_and_kept_by_what_it_is(monkeypatch):
    """The published steps, seed and task reach the trainer; the key names the task where there is one."""
    asked = []

    class Kept(Context):
        def fitted(self, name, key, training):
            asked.append((name, key, training))
            return {}

    monkeypatch.setattr(predictor, "from_tensors", lambda tensors: predictor.shipped("neural_sos"))
    for task in ("", "n4-d12-m30-dense"):
        NeuralSos(steps=200, task=task).certify(COERCIVE, Kept(seed=7))
    (name, key, plain), (other, longer, of_task) = asked
    assert name == other == "predictor" and key["form"] == "candidates" and key["seed"] == 7
    assert "task" not in key and longer == {**key, "task": "n4-d12-m30-dense"}
    assert plain == predictor_fit.Training(predictor_fit.FIT.of(200), 7)
    assert of_task == predictor_fit.Training(predictor_fit.FIT.of(200), 7, planted.task("n4-d12-m30-dense"))
    assert key["fit"] == dataclasses.asdict(plain.fit)


def test_what_a_training_is_planned_at():
    """Seconds of one core, as measured: 0.08 a step, of the form sequence 0.25; the shipped network takes none."""
    assert NeuralSos().ahead()[1] == 0
    assert NeuralSos(steps=4000).ahead() == (("candidates", 4000, ""), pytest.approx(320))
    assert NeuralSos(steps=200, form="sequence").ahead() == (("sequence", 200, ""), pytest.approx(50))
