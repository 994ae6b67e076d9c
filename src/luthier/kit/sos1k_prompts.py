"""What a language model is asked of a polynomial, at three levels: the question, with hints, with all criteria.

The levels are those of SoS-1K (arXiv 2502.20545); the words are this library's own. What is asked is the same at
every level: whether the polynomial is a sum of squares, answered by yes or no.
"""

from __future__ import annotations

ASKED = "Is this polynomial a sum of squares of polynomials with real coefficients?"
ANSWER = 'Answer with "Yes" or "No" alone.'
HINTS = """Things to look at, the easy ones first:
- whether the degree is even
- the coefficients of the highest powers of single variables
- whether the value is negative somewhere
- whether it is a case in which nonnegative is enough: degree 2, one variable, degree 4 in two variables, \
homogeneous of degree 4 in three variables
- whether it can be seen as squares added up
- a matrix Q with p = y'Qy for the vector y of monomials"""
STEPS = """Go through these steps in order and stop at the first that decides.
1. Degree: take the largest sum of exponents in a term. If it is odd, the answer is no: far out in some direction \
the polynomial is negative. If it is even, go on.
2. Highest pure powers: let d be the degree. If some variable's power x^d has a negative coefficient, the answer is \
no, since the polynomial is negative far out on that axis. Mixed terms may be negative.
3. Values: look for a point where the polynomial is negative. Try the origin (the constant term), the points with one \
coordinate 1 or -1 and the others 0, a small grid, and places where a local minimum may lie. One negative value \
means no. Finding none decides nothing.
4. Cases in which being nonnegative everywhere is the same as being a sum of squares: degree 2; one variable; degree 4 \
in two variables; homogeneous of degree 4 in at most three variables; a multiple of (x1^2 + ... + xn^2)^2 plus a \
polynomial of degree at most 2. There, find the least value: if it is negative the answer is no, else yes.
5. Squares: try to write it as squares added up, with positive factors. If that succeeds the answer is yes. Squares \
less a constant may or may not be a sum of squares: that alone decides nothing.
6. Matrix: let y hold the monomials of degree 0 up to d/2, and write p = y'Qy with a symmetric Q. There are \
many such Q. If one has no negative eigenvalue the answer is yes. If all have one the answer is no; that a single Q \
has one decides nothing.
7. A polynomial may be nonnegative everywhere and still no sum of squares, such as x^4*y^2 + x^2*y^4 - 3*x^2*y^2 + 1."""
LEVELS = {"plain": (), "simple": (HINTS,), "reasoning": (STEPS,)}
"""What stands between the question and the polynomial."""


def prompt(level: str, polynomial: str) -> str:
    """The prompt of a level for a polynomial given as text."""
    return "\n\n".join([ASKED, *LEVELS[level], polynomial, ANSWER])
