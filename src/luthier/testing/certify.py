"""Checks of Certifies: what is called proven is proven and true, a corrupted proof is refused, no proof is no crash."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache, partial
from typing import Any

import torch

from luthier.catalogue import Card, find
from luthier.flows import Certificate
from luthier.kit.context import Context
from luthier.testing import Check, must
from luthier.testing.variants import variants

PROVEN = ("exact", "not_sos")
STATUSES = (*PROVEN, "numeric", "unknown")
YES, NO, BOTH = ("exact",), ("not_sos",), ("exact", "not_sos")
INSIDE = {
    "2*x^2 + 2*x*y + 5*y^2 + 1/3": YES,
    "x^4 + y^4 + 4*x^2*y^2 + 3*x^2 - x*y + 2": YES,
    "x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1": BOTH,
    "x^2*y^2 + x^2*z^2 + y^2*z^2 + w^4 - 4*x*y*z*w": BOTH,
    "x^2 - 4*x*y + y^2": NO,
    "x^3 + y^2": NO,
}
"""What a complete method proves at its defaults: truths away from the boundary between the two. Both hold of what is
nonnegative and no sum of squares: with a multiplier it is one, and the verifier takes no other proof."""
EDGE = {
    "(x^2 - 1)^2": YES,
    "0": YES,
    "-7": NO,
    "x^4 + x*y^3 + y^4 - 3*x^2*y*z - 4*x*y^2*z + 2*x^2*z^2 + x*z^3 + y*z^3 + z^4": YES,
}
"""Truths that need not be found; the last one is a sum of squares of real but of no rational polynomials."""
QUADRATICS = ("2*x^2 + 2*x*y + 5*y^2 + 1/3", "x^2 + x*y/2 + y^2 - y*z + 3*z^2", "7/3*u^2 - u + 1")
CPU_SECONDS = 10.0


def checks(entry: Card) -> list[Check]:
    every = [runs, proofs_hold, proves_what_is_inside, corrupted, same_bytes, problems_unchanged]
    return [Check(f.__name__.replace("_", " "), partial(f, entry)) for f in every]


def certify(method: Any, problem: Any, seed: int = 0) -> Certificate:
    return method.certify(problem, Context(seed=seed, step="contract"))


@cache
def _made(method: Any) -> dict[str, Certificate]:
    return {text: certify(method, text) for text in INSIDE | EDGE}


def runs(entry: Card) -> None:
    """A certificate for every problem and setting, with a reason, equal after JSON, quick."""
    for method in variants(find(entry.id)):
        began = time.process_time()
        for text, made in _made(method).items():
            must(made.status in STATUSES, f"{method}: the status {made.status!r} of {text}")
            must(made.reason and "\n" not in made.reason, f"{method}: no reason in one line for {text}")
            must(Certificate.from_json(made.to_json()) == made, f"{method}: the certificate of {text} changes by JSON")
            must(made.status in PROVEN or made.tried or made.numbers or "largest" in made.reason,
                 f"{method}: does not say what was tried on {text}")  # fmt: skip
        must(time.process_time() - began < CPU_SECONDS, f"{method} takes over {CPU_SECONDS} s of CPU time")


def proofs_hold(entry: Card) -> None:
    """Under every setting: the verifier accepts each proof after JSON, none says what is not true, and a
    certificate without a proof does not verify."""
    for method in variants(find(entry.id)):
        for text, made in _made(method).items():
            again = Certificate.from_json(made.to_json())
            if made.status in PROVEN:
                must(again.verify(), f"{method}: {text}: {again.refusal()}")
                must(
                    made.bound != "0" or made.status in (INSIDE | EDGE)[text],
                    f"{method}: {text} is said to be {made.status}",
                )
            else:
                must(not again.verify(), f"{method}: {text} verifies as {made.status}")
            must(_same_values(text, made), f"{method}: the certificate of {text} is about {made.problem}")


def _same_values(text: str, made: Certificate) -> bool:
    """Whether the certificate's polynomial is the text's, by Python's own arithmetic at a few points."""
    source = text.replace("^", "**")
    for shift in range(4):
        point = {v: Fraction(3 * i + shift + 1, 2 + i) for i, v in enumerate("uwxyz")}
        said = sum(
            Fraction(c) * _power([point[v] for v in made.variables], exponents) for exponents, c in made.polynomial
        )
        if said != _plain_value(source, point):
            return False
    return True


def _power(values: list[Fraction], exponents: tuple[int, ...]) -> Fraction:
    total = Fraction(1)
    for x, e in zip(values, exponents, strict=True):
        total *= x**e
    return total


def _plain_value(source: str, point: Mapping[str, Fraction]) -> Fraction:
    """The value of one of the texts above, which Python can read itself."""
    import ast

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.Name):
            return point[node.id]
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        kinds = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
        if isinstance(node.op, ast.Pow):
            return left ** int(right)
        return left / right if isinstance(node.op, ast.Div) else kinds[type(node.op)]

    return value(ast.parse(source, mode="eval").body)


def proves_what_is_inside(entry: Card) -> None:
    """At its defaults a complete method proves or refutes what is away from the boundary; any proves some."""
    method = variants(find(entry.id))[0]
    made = _made(method)
    missed = [text for text, truths in INSIDE.items() if made[text].status not in truths]
    for text in missed if method.complete else missed[3:]:
        must(False, f"{text} is {made[text].status}: {made[text].reason}")


def corrupted(entry: Card) -> None:
    """A certificate in which something is changed proves nothing any more."""
    made = _made(variants(find(entry.id))[0])
    kinds = set()
    for text in INSIDE:
        for what, wrong in _corruptions(made[text]):
            kinds.add(what)
            must(wrong.refusal(), f"{text}: accepted with {what}")
            must(Certificate.from_json(wrong.to_json()).refusal(), f"{text}: accepted from JSON with {what}")
    must(len(kinds) >= 5, f"only {kinds} could be corrupted")


def _corruptions(good: Certificate) -> Iterator[tuple[str, Certificate]]:
    swap = dataclasses.replace
    (exponents, number), *rest = good.polynomial
    yield "no proof", swap(good, squares=(), functional=(), point=())
    if not (good.squares and good.functional):  # these prove both
        yield "another status", swap(good, status="exact" if good.status == "not_sos" else "not_sos")
    yield "an unproven status", swap(good, status="numeric")
    yield "a number that is none", swap(good, polynomial=((exponents, "one"), *rest))
    for i, (weight, terms) in enumerate(good.squares):
        others = good.squares[:i], good.squares[i + 1 :]
        first, *last = terms
        nudged = (first[0], str(Fraction(first[1]) + Fraction(1, 10**12)))
        yield "a square left out", swap(good, squares=others[0] + others[1])
        yield "a negative weight", swap(good, squares=(*others[0], ("-" + weight, terms), *others[1]))
        yield "another coefficient", swap(good, squares=(*others[0], (weight, (nudged, *last)), *others[1]))
    if good.squares:
        more = (exponents, str(Fraction(number) + 1))
        yield "another polynomial", swap(good, polynomial=(more, *rest))
    if good.multiplier:
        yield "a multiplier left out", swap(good, multiplier=())
        yield "a multiplier that is 0", swap(good, multiplier=(), squares=(), functional=())
        yield "a larger bound", swap(good, bound="1")
    if good.point:
        yield "a point that is not negative", swap(good, point=("0",) * len(good.point))
        yield "a point of another space", swap(good, point=(*good.point, "1"))
    if good.functional:
        turned = tuple((m, str(-Fraction(c))) for m, c in good.functional)
        yield "the functional turned round", swap(good, functional=turned)
        for i in range(len(good.basis)):
            yield "a basis that lacks a monomial", swap(good, basis=good.basis[:i] + good.basis[i + 1 :])


def same_bytes(entry: Card) -> None:
    """The same problem gives the same certificate, to the byte: again, and given as a map."""
    for method in variants(find(entry.id)):
        for text in ("x1^4 - x1^2*x2 + 2*x2^2 + 1/7", "x1^2*x2^2 - 2/3"):
            first = certify(method, text).to_json()
            torch.rand(3)
            must(certify(method, text).to_json() == first, f"{method}: {text} gives another certificate again")
            must(certify(method, _as_map(text)).to_json() == first, f"{method}: {text} as a map gives another")


def _as_map(text: str) -> dict[tuple[int, ...], Any]:
    if "1/7" in text:
        return {(0, 0): Fraction(1, 7), (0, 2): 2, (2, 1): -1, (4, 0): 1}
    return {(2, 2): 1.0, (0, 0): Fraction(-2, 3)}


def problems_unchanged(entry: Card) -> None:
    method, problem = variants(find(entry.id))[0], _as_map("1/7")
    before = copy.deepcopy(problem)
    certify(method, problem)
    must(list(problem.items()) == list(before.items()), "the problem is changed")


def outcome(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """{"polynomial": "weight * square, ..."} of fixed quadratics. given: {"degree": 2}."""
    return {text: _listed(certify(method, text)) for text in QUADRATICS}


def _listed(made: Certificate) -> str:
    return str([(weight, sorted(terms)) for weight, terms in made.squares])


def _completed(method: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Lagrange's way: take the square that removes the first variable, then the next, the constant last."""
    return {text: _listed(_lagrange(certify(method, text))) for text in QUADRATICS}


def _lagrange(asked: Certificate) -> Certificate:
    rest = {m: Fraction(c) for m, c in asked.polynomial}
    count, squares = len(asked.variables), []
    units = [tuple(int(i == j) for j in range(count)) for i in range(count)]
    for i in range(count):
        lead = rest.pop(tuple(2 * e for e in units[i]))
        line = {m: c for m, c in rest.items() if m[i]}
        rest = {m: c for m, c in rest.items() if not m[i]}
        half = {tuple(e - u for e, u in zip(m, units[i], strict=True)): c / (2 * lead) for m, c in line.items()}
        for a, x in half.items():
            for b, y in half.items():
                key = tuple(e + f for e, f in zip(a, b, strict=True))
                rest[key] = rest.get(key, Fraction(0)) - lead * x * y
        squares.append((str(lead), tuple((m, str(c)) for m, c in {units[i]: Fraction(1), **half}.items())))
    zero = (0,) * count
    if rest.get(zero):
        squares.append((str(rest[zero]), ((zero, "1"),)))
    return dataclasses.replace(asked, squares=tuple(squares))


PEERS: dict[str, Any] = {"completing the square": _completed}
