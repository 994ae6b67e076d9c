"""The ways of ours that sos.py compares, each a function of a polynomial and what is known of how it was planted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from luthier import catalogue
from luthier.flows import Certificate
from luthier.kit import gram, lattice, moments, proof
from luthier.kit.attempts import Settings, attempt
from luthier.kit.cones import Program, cone
from luthier.kit.context import Context
from luthier.kit.planted import Planted
from luthier.kit.polynomial import Polynomial
from luthier.kit.problem import Problem

Way = Callable[[Polynomial, Planted], Certificate]
LARGEST = 100
"""monomials of one block that are tried"""
WAYS = ("neural", "consistency", "rules", "hidden", "sdsos", "dsos", "newton", "full")
"""In the order of the table. hidden: the planted basis is given."""


def ways() -> dict[str, Way]:
    """Ours, by name; those whose method is not in the catalogue are left out."""
    ctx: Any = Context()
    settings = Settings(largest=LARGEST)

    def loaded(id_: str, **fields: Any) -> Way:
        method: Any = catalogue.load(id_, **fields)
        return lambda p, planted: method.certify(p, ctx)

    made = {
        "consistency": lambda p, planted: reduced(p, settings, ctx),
        "newton": loaded("sos.certify", basis="newton", largest=LARGEST, first="none"),
        "full": lambda p, planted: all_monomials(p, settings, ctx),
        "hidden": lambda p, planted: proof.over(p, planted.hidden, settings, ctx, complete=False),
    }
    for name, id_, fields in (
        ("neural", "sos.neural_sos", {"largest": LARGEST}), ("rules", "sos.heuristic", {"largest": LARGEST}),
        ("sdsos", "sos.dsos", {}), ("dsos", "sos.dsos", {"cone": "dsos"}),
    ):  # fmt: skip
        if id_ in catalogue.cards():
            known = {f.name for f in catalogue.card(id_).fields}
            made[name] = loaded(id_, **{k: v for k, v in fields.items() if k in known})
    return {name: made[name] for name in WAYS if name in made}


def reduced(p: Polynomial, settings: Settings, ctx: Any) -> Certificate:
    """All that iterated diagonal consistency leaves, found without a hull or a box."""
    basis = lattice.possible(p)
    if basis is None:
        return proof.given(Problem(p), "unknown", "too many monomials to choose a basis from", numbers={})
    return proof.over(p, basis, settings, ctx, complete=True)


def all_monomials(p: Polynomial, settings: Settings, ctx: Any) -> Certificate:
    """One Gram matrix over every monomial of at most half the degree."""
    asked, numbers = Problem(p), {"all": gram.everything(p), "basis": gram.everything(p)}
    _, memory = moments.cost([int(numbers["all"])])
    if numbers["all"] > settings.largest:
        return proof.given(asked, "unknown", f"too large, about {memory / 2**30:.3g} GiB", numbers=numbers)
    basis = gram.full(p) or []
    settings = dataclasses.replace(settings, minors=False)  # known minors would leave out what this is to measure
    found = attempt(dict(p.terms), Program((cone(basis),)), settings, ctx, refute=False)
    if found.squares is None:
        return proof.given(asked, "numeric" if found.numeric else "unknown", "no proof in fractions", numbers=numbers)
    squares = [s for _, several in found.squares for s in several]
    return proof.given(asked, "exact", "squares", squares=squares, basis=basis, numbers=numbers)
