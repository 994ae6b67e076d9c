"""Faces by known minors, in fractions: where part of every Gram matrix is known and singular, so is the whole.

Coefficients that one product alone gives determine its entry of the Gram matrix. A principal minor of such entries is
the same in every Gram matrix of p; if it maps a vector to 0, then so does every positive semidefinite matrix that
holds it, and the squares lie over what is orthogonal to that vector. Over fewer polynomials more entries may be
known, so this is done until nothing changes. Diagonal consistency is the case of one entry that is 0.

No solver is asked and no float is trusted: a face on which sparse or low-rank squares lie is found at once, whatever
its numbers, where reading null spaces off floats (`kit.faces`) meets small fractions only.

N: polynomials of a basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from luthier.kit.cones import Program
from luthier.kit.faces import kernel, over
from luthier.kit.polynomial import Exponents, Terms

WIDEST, CLIQUES = 200, 400
"""Polynomials of a basis, and minors of a cone, that are looked at, at most."""
SINGULAR = 1e-9
"""An eigenvalue below this, diagonals being 1, is worth elimination in fractions."""
Known = list[dict[tuple[int, int], Fraction]]


def face(program: Program, target: Terms) -> Program | None:
    """The program over what known minors leave; None if that is all of it, or nothing, or if it is too large."""
    if program.largest > WIDEST:
        return None
    now = program
    while (smaller := _once(now, target)) is not None:
        now = smaller
    return None if now is program or any(m not in now.monomials for m in target) else now


def _once(program: Program, target: Terms) -> Program | None:
    cones, changed = [], False
    for cone, entries in zip(program.cones, known(program, target), strict=True):
        vectors = _null_vectors(entries, len(cone.basis))
        left = kernel(vectors, len(cone.basis), even=True)
        changed = changed or bool(vectors)
        if left:
            cones.append(over(cone, left) if vectors else cone)
    return Program(tuple(cones), program.free) if changed and cones else None


def known(program: Program, target: Terms) -> Known:
    """{(i, j): Q_ij} of each cone, i <= j, that the target's coefficients determine one after another."""
    columns = [((k, i, j), terms, 1 + (i != j)) for k, c in enumerate(program.cones) for i, j, terms in c.entries]
    columns += [((-1, -1, -1), terms, 1) for free in program.free for terms in free.entries]
    touching: dict[Exponents, set[int]] = {}
    for at, (_, terms, _) in enumerate(columns):
        for m in terms:
            touching.setdefault(m, set()).add(at)
    lacking = {m: target.get(m, Fraction(0)) for m in touching}
    found: Known = [{} for _ in program.cones]
    ready = [m for m, several in touching.items() if len(several) == 1]
    while ready:
        m = ready.pop()
        if len(touching[m]) != 1:
            continue
        at = touching[m].pop()
        (k, i, j), terms, often = columns[at]
        value = lacking[m] / often if terms[m] == 1 else lacking[m] / (often * terms[m])
        if k >= 0:
            found[k][i, j] = value
        if len(terms) == 1:  # no other column gives m, and this one gives nothing else
            continue
        for other, c in terms.items():
            lacking[other] -= often * c * value
            touching[other].discard(at)
            if len(touching[other]) == 1:
                ready.append(other)
    return found


def _null_vectors(entries: dict[tuple[int, int], Fraction], size: int) -> list[list[Fraction]]:
    """Independent vectors that every known minor together maps to 0."""
    found: list[list[Fraction]] = []
    seen_rN = np.zeros((0, size))
    near = [0] * size
    for i, j in entries:
        if i != j and (i, i) in entries and (j, j) in entries:
            near[i] |= 1 << j
            near[j] |= 1 << i
    floats_NN, units_N = _floats(entries, size)
    for count, group in enumerate(_cliques(near, [i for i in range(size) if (i, i) in entries])):
        if count == CLIQUES:
            break
        floats = _null_space(floats_NN, units_N, group)
        if len(floats) and np.linalg.matrix_rank(np.vstack([seen_rN, floats]), tol=1e-6) > len(seen_rN):
            minor = [[entries[min(i, j), max(i, j)] for j in group] for i in group]
            for short in kernel(minor, len(group)):
                vector = [Fraction(0)] * size
                for i, value in zip(group, short, strict=True):
                    vector[i] = value
                found.append(vector)
            seen_rN = _orthonormal(np.vstack([seen_rN, floats]))
    return found


def _floats(entries: dict[tuple[int, int], Fraction], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The entries in units of their diagonals, and these units."""
    floats_NN = np.zeros((size, size))
    for (i, j), x in entries.items():
        floats_NN[i, j] = floats_NN[j, i] = float(x)
    units_N = np.sqrt(np.abs(floats_NN.diagonal()))
    units_N[units_N == 0.0] = 1.0
    return floats_NN / np.outer(units_N, units_N), units_N


def _null_space(floats_NN: np.ndarray, units_N: np.ndarray, group: list[int]) -> np.ndarray:
    """Rows that span what the minor maps to 0, as far as floats see."""
    if len(group) == 1 and floats_NN[group[0], group[0]]:
        return np.zeros((0, len(units_N)))
    minor = floats_NN[np.ix_(group, group)]
    if np.abs(np.linalg.eigvalsh(minor)).min() >= 2 * SINGULAR:  # most are not singular, and need no vectors
        return np.zeros((0, len(units_N)))
    values, vectors = np.linalg.eigh(minor)
    short = vectors[:, np.abs(values) < SINGULAR].T / units_N[group]
    wide = np.zeros((len(short), len(units_N)))
    wide[:, group] = short / np.linalg.norm(short, axis=1, keepdims=True)
    return wide


def _orthonormal(rows_rN: np.ndarray) -> np.ndarray:
    _, sizes, right = np.linalg.svd(rows_rN, full_matrices=False)
    return right[sizes > 1e-6 * sizes.max(initial=0.0)]


def _cliques(near: list[int], vertices: list[int]) -> Iterator[list[int]]:
    """Maximal cliques (Bron and Kerbosch, with a pivot). near: of each vertex its neighbours as bits."""
    whole = sum(1 << i for i in vertices)
    stack = [(0, whole, 0)]
    while stack:
        clique, open_, done = stack.pop()
        if not open_:
            if not done and clique:
                yield _places(clique)
            continue
        pivot = max(_places(open_ | done), key=lambda v: (near[v] & open_).bit_count())
        for v in _places(open_ & ~near[pivot]):
            stack.append((clique | 1 << v, open_ & near[v], done & near[v]))
            open_, done = open_ & ~(1 << v), done | 1 << v


def _places(bits: int) -> list[int]:
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found
