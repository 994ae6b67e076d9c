"""Neural Sum-of-Squares: a trained network guesses the monomials of the squares; no proof rests on it.

Paper: arXiv 2510.13444.

A network reads what iterated diagonal consistency leaves and says of every candidate how likely the squares need
it (`kit.predictor`). The likely ones are repaired until they cover p's exponents and asked first; then bases that
grow by the factor rho, in the order of the scores; at last all candidates. A guess that fails costs a program,
never the truth: a functional against squares must be one over the last basis, and `luthier.verifier` checks what is
said. At worst the programs take 1.43 times what the last alone takes, if cost grows with the third power of the
basis, and 1.16 times at the fifth (`kit.staged`).

The paper's network writes monomials one after another and asks for votes over renamings of the variables; it is here
as form=sequence (`kit.sequence`). The other form scores candidates, and no renaming changes what it says; its shipped
weights were trained on planted sums of squares in 2 to 8 variables, up to 210 candidates; the card beside the weights
says how, and what it gains.

Footguns. The gain is where exact reduction leaves many monomials, as on coercive polynomials; elsewhere
`sos.certify` is as fast. On planted polynomials the rules of `sos.heuristic`, which needs no network, do as well: the
card has the numbers. Polynomials that arise otherwise than by planting may need other monomials than the network was
taught. A bad guess can end in `numeric` or `unknown` where a good one ends in a proof, since large bases leave less
room for rounding, or are above `largest`. Constraints are not looked at.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Annotated, Any, Literal

import torch

from luthier.errors import LuthierError
from luthier.fields import Count, Natural, Positive, Range
from luthier.flows import Certificate, Ctx
from luthier.kit import lattice, planted, predictor, predictor_fit, proof, rules, sequence, sequence_fit, staged
from luthier.kit.attempts import Settings
from luthier.kit.polynomial import Exponents, Polynomial
from luthier.shapes import Certify, Reduces

MOST = predictor_fit.CANDIDATES
"""candidates that the network is given, whose memory grows with their square; more are ranked by rule"""


class NeuralSos(Certify):
    """Weighted squares in fractions over the monomials that a network proposes, or a proof that there are none."""

    form: Literal["candidates", "sequence"] = "candidates"
    """candidates: scores all at once, and needs no votes; sequence: writes the basis, as published"""
    steps: Natural = 0
    """training steps of a network made anew, kept in the cache of the run (a killed training goes on where it was last
    saved); 0 takes the one that is shipped, which is of the form candidates"""
    task: str = ""
    """what it is trained on: nothing for the mixture of the shipped one, or a setting of the published grid by its
    variables, degree, basis size and structure, as n8-d6-m20-sparse, or n8-d6-m20-sparse-clique"""
    threshold: Annotated[float, Range(0.0, 1.0)] = 0.5
    """candidates that score higher are asked first"""
    permutations: Count = 4
    """renamings of the variables that rank the candidates of the form sequence, if its first basis fails"""
    rho: Annotated[float, Range(1.1, 4.0)] = 1.5
    """factor between the sizes of bases that are asked one after another"""
    faces: bool = True
    """where there is no room for rounding, ask over the face that holds all squares"""
    bits: Annotated[int, Range(0, 200)] = 40
    """Gram entries are rounded to multiples of 2^-bits of the largest coefficient; coarser grids are tried first"""
    tolerance: Annotated[float, Range(1e-14, 1e-2)] = 1e-8
    """of the solver; a proof does not depend on it"""
    largest: Count = 100
    """most monomials of one block: the solver's memory grows with their fourth power"""
    seconds: Positive | None = None
    """time the solver may take for each program; null means no limit"""

    reduces_to = Reduces({}, "completing the square", given={"degree": 2})

    def check(self) -> None:
        if self.form == "sequence" and not self.steps:
            raise LuthierError(
                "no network of the form sequence is shipped", where=self.id, do="give steps, to train one"
            )
        if self.task:
            planted.task(self.task)
            if not self.steps:
                what = f"no network is shipped that was trained on {self.task} alone"
                raise LuthierError(what, where=self.id, do="give steps, to train one")

    def ahead(self) -> tuple[Any, float]:
        each = 0.25 if self.form == "sequence" else 0.08  # seconds of the mixture; the largest tasks take five times it
        return (self.form, self.steps, self.task), each * self.steps

    def certify(self, problem: Any, ctx: Ctx) -> Certificate:
        asked, settled = proof.opened(problem)
        if settled:
            return settled
        p = asked.polynomial
        settings = Settings(self.bits, self.tolerance, self.largest, self.seconds, self.faces)
        complete = lattice.possible(p)
        if complete is None:
            return proof.over(p, rules.corners(p), settings, ctx, complete=False)
        opening, ranking = self._guess(p, complete, ctx)
        return staged.staged(p, [opening], ranking, complete, self.rho,
                             lambda basis, last: proof.over(p, basis, settings, ctx, complete=last))  # fmt: skip

    def _guess(self, p: Polynomial, complete: list[Exponents], ctx: Ctx) -> tuple[list[Exponents], staged.Ranking]:
        """The basis that is asked first, and what gives the candidates, likeliest first."""
        if self.form == "sequence" and sequence.fits(p):
            return self._written(p, complete, ctx)
        if self.form == "sequence" or len(complete) > MOST:
            return rules.corners(p, complete), lambda: rules.ranked(p, complete)
        network = self._network(ctx, predictor, predictor_fit)
        value = dict(zip(complete, predictor.scores(network, p, complete), strict=True))
        likely = [a for a in complete if value[a] > self.threshold]
        return rules.repaired(p, likely, complete, value), lambda: sorted(complete, key=lambda a: -value[a])

    def _written(self, p: Polynomial, complete: list[Exponents], ctx: Ctx) -> tuple[list[Exponents], staged.Ranking]:
        """The same by the sequence form: what it writes, and the votes over renamed variables."""
        network = self._network(ctx, sequence, sequence_fit)
        allowed = set(complete)

        def mended(written: list[Exponents]) -> list[Exponents]:
            return rules.repaired(p, [a for a in written if a in allowed], complete)

        def ranking() -> list[Exponents]:
            width = len(p.variables)
            orders = [torch.randperm(width, generator=ctx.rng("order", i)).tolist() for i in range(self.permutations)]
            found = Counter(a for written in sequence.votes(network, p, orders) for a in mended(written))
            return sorted(rules.ranked(p, complete), key=lambda a: -found[a])

        return mended(sequence.greedy(network, p)), ranking

    def _network(self, ctx: Ctx, form: Any, training: Any) -> Any:
        """The shipped network of a form, or one that is trained now."""
        if not self.steps:
            return predictor.shipped("neural_sos")
        fit = training.FIT.of(self.steps)
        key = {"form": self.form, "fit": dataclasses.asdict(fit), "seed": ctx.seed}  # the same for every step of a run
        key |= {"task": self.task} if self.task else {}
        asked = training.Training(fit, ctx.seed, planted.task(self.task) if self.task else None)
        return form.from_tensors(ctx.fitted("predictor", key, asked))
