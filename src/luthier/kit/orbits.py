"""Permutation symmetry: where swaps of variables leave p as it is, the solver is given one block of each kind.

Moments of monomials that swaps carry into one another are equal, and so are Gram matrices of such blocks. A block
that swaps map to itself falls apart further: a random matrix that commutes with them has the irreducible parts as
its eigenspaces (Murota, Kanno, Kojima, Kojima, Japan J. Indust. Appl. Math. 27, 2010); of parts that are copies of
one another, one vector each says all. Groups made of swaps have real irreducible parts only. The Gram matrices come
back in full, in floats; rounding and proof know nothing of this.

N: monomials of a block, d: dimension of a part, m: copies of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from luthier.kit.cones import Program
from luthier.kit.polynomial import Exponents, Terms

EQUAL = 1e-7
"""Eigenvalues closer than this are one."""


@dataclass(frozen=True)
class Part:
    """One kind of irreducible part of a block: the solver sees u'M u for the first vectors u of its copies.

    cone: the block.  bases_mNd: an orthonormal basis of each copy, all turned alike.
    """

    cone: int
    bases_mNd: np.ndarray

    @property
    def first_Nm(self) -> np.ndarray:
        return self.bases_mNd[:, :, 0].T


@dataclass(frozen=True)
class Folded:
    """orbit: number of each monomial's orbit, in the program's order.  places: of each block, the block it is a copy
    of, and where each of its monomials lies there.  parts: of the blocks that are no copies."""

    orbit: np.ndarray
    orbits: int
    places: tuple[tuple[int, np.ndarray], ...]
    parts: tuple[Part, ...]

    def grams(self, program: Program, reduced: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Gram matrices of all blocks from the parts' own."""
        whole = {k: np.zeros((len(program.cones[k].basis),) * 2) for k, _ in self.places}
        alike = [sum(k == other for other, _ in self.places) for k, _ in self.places]
        for part, small_mm in zip(self.parts, reduced, strict=True):
            d = part.bases_mNd.shape[2]
            full = np.einsum("aid,ab,bjd->ij", part.bases_mNd, small_mm, part.bases_mNd)
            whole[part.cone] += full / (d * alike[part.cone])
        return tuple(whole[k][np.ix_(place, place)] for k, place in self.places)


def folded(program: Program, target: Terms) -> Folded | None:
    """What swaps of variables leave of the program; None where there are none, or it is not over plain monomials."""
    swaps = _swaps(target)
    if not swaps or program.free or not all(c.plain for c in program.cones):
        return None
    numbers = program.monomials
    sets = [c.monomials for c in program.cones]
    home = {frozenset(s): k for k, s in enumerate(sets)}
    links, pairs, moves = [], [], []
    for swap in swaps:
        turned = {m: _turned(m, swap) for m in {*numbers, *(m for s in sets for m in s)}}
        if any(turned[m] not in numbers for m in numbers):
            return None
        links += [(numbers[m], numbers[turned[m]]) for m in numbers]
        images = [home.get(frozenset(turned[m] for m in s), -1) for s in sets]
        if -1 in images:
            return None
        moves.append([(k, [sets[k].index(turned[m]) for m in s]) for k, s in zip(images, sets, strict=True)])
    starts = np.cumsum([0, *(len(s) ** 2 for s in sets)])
    for move in moves:
        for k, (image, place) in enumerate(move):
            size = len(place)
            for i, j in itertools.product(range(size), repeat=2):
                pairs.append((starts[k] + i * size + j, starts[image] + place[i] * size + place[j]))
    orbit, orbits = _classes(len(numbers), links)
    kinds, count = _classes(int(starts[-1]), pairs)
    places = _places(sets, moves)
    rng = np.random.default_rng(0)
    parts = []
    for k in sorted({k for k, _ in places}):
        of = kinds[starts[k] : starts[k + 1]].reshape(len(sets[k]), -1)
        matrices = (rng.standard_normal(count)[of] for _ in range(2))
        parts += [Part(k, bases) for bases in _parts(*(a + a.T for a in matrices))]
    return Folded(orbit, orbits, places, tuple(parts))


def _swaps(target: Terms) -> list[tuple[int, int]]:
    """Pairs of variables that may be exchanged, neighbours within each class."""
    width = len(next(iter(target), ()))
    found: list[tuple[int, int]] = []
    left = list(range(width))
    while left:
        first, *rest = left
        alike = [j for j in rest if all(target.get(_turned(m, (first, j))) == c for m, c in target.items())]
        found += itertools.pairwise([first, *alike])
        left = [j for j in rest if j not in alike]
    return found


def _turned(m: Exponents, swap: tuple[int, int]) -> Exponents:
    i, j = swap
    turned = list(m)
    turned[i], turned[j] = m[j], m[i]
    return tuple(turned)


def _classes(count: int, links: Iterable[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """The number of each one's class, where linked ones are in one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = np.array(list(links), dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
    number, classes = connected_components(graph, directed=False)
    return classes, int(number)


def _places(
    sets: Sequence[Sequence[Exponents]], moves: Sequence[Sequence[tuple[int, list[int]]]]
) -> tuple[tuple[int, np.ndarray], ...]:
    """Of every block the first one it is a copy of, and its monomials' places there."""
    found: dict[int, tuple[int, np.ndarray]] = {}
    for k in range(len(sets)):
        if k in found:
            continue
        found[k] = k, np.arange(len(sets[k]))
        edge = [k]
        while edge:
            one = edge.pop()
            for move in moves:
                image, place = move[one]
                if image not in found:
                    back = np.empty(len(place), dtype=int)
                    back[place] = found[one][1]
                    found[image] = k, back
                    edge.append(image)
    return tuple(found[k] for k in range(len(sets)))


def _parts(first_NN: np.ndarray, second_NN: np.ndarray) -> list[np.ndarray]:
    """Bases (m, N, d) of all irreducible parts, copies together, from two matrices that commute with the group."""
    values, vectors = np.linalg.eigh(first_NN)
    cuts = np.flatnonzero(np.diff(values) > EQUAL * max(1.0, np.abs(values).max())) + 1
    spaces = np.split(vectors, cuts, axis=1)
    found: list[list[np.ndarray]] = []
    for space in spaces:
        for copies in found:
            turn = copies[0].T @ second_NN @ space
            size = float(np.linalg.norm(turn)) / np.sqrt(space.shape[1])
            if copies[0].shape == space.shape and size > EQUAL * 1e2:
                copies.append(space @ turn.T / size)
                break
        else:
            found.append([space])
    return [np.stack(copies) for copies in found]
