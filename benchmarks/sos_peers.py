"""One polynomial through one peer, in the peer's own environment; run by sos.py, which never imports a peer.

    PYTHON sos_peers.py triples|sumofsquares|sospy SECONDS < '{"variables": 2, "terms": [[[2, 0], "1/3"], ..]}'

Prints one line of JSON: CPU-seconds of the imports and of the call, what the peer says, its basis's size where it has
one. Each is asked as its documentation does:
triples: `sum_of_squares(p)`; SumOfSquares: `add_sos_constraint(p, variables, sparse=True)`, and without sparse where
its convex hull fails; SOSPy: `sosineq(program, p)`, `sossolve` with CVXOPT. SOSPy's option "sparse" is not taken: its
basis lost monomials that were needed, and sums of squares were called infeasible.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        began = time.process_time()
        import sympy

        ask = {"triples": triples, "sumofsquares": sumofsquares, "sospy": sospy}[name]()
        import_s = time.process_time() - began
        symbols = sympy.symbols([f"x{i + 1}" for i in range(asked["variables"])])
        terms = {tuple(exponents): sympy.Rational(c) for exponents, c in asked["terms"]}
        p = sympy.Poly(terms, *symbols)
        began = time.process_time()
        try:
            said = ask(p, symbols, seconds)
        except Exception as fault:
            said = {"verdict": f"fails: {type(fault).__name__}: {' '.join(str(fault).split())[:60]}"}
        said |= {"cpu_s": time.process_time() - began, "import_s": import_s}
    print(json.dumps(said))


def triples():  # noqa: ANN201 (no annotation of ours is read in the peers' environments)
    from triples import sum_of_squares

    def ask(p, symbols, seconds):
        found = sum_of_squares(p.as_expr(), time_limit=seconds)
        return {"verdict": "unknown" if found is None else "exact"}

    return ask


def sumofsquares():  # noqa: ANN201
    from SumOfSquares import SOSProblem

    def ask(p, symbols, seconds):
        program = SOSProblem()
        try:
            constraint, hull = program.add_sos_constraint(p.as_expr(), symbols, sparse=True), ""
        except Exception as fault:
            program = SOSProblem()
            constraint, hull = program.add_sos_constraint(p.as_expr(), symbols), f", no hull: {type(fault).__name__}"
        try:
            program.solve(solver="cvxopt")
        except Exception as fault:
            return {"verdict": f"unknown: {type(fault).__name__}{hull}", "basis": len(constraint.basis)}
        said = "numeric" if program.status == "optimal" else f"unknown: {program.status}"
        return {"verdict": said + hull, "basis": len(constraint.basis)}

    return ask


def sospy():  # noqa: ANN201
    from SOSPy import sosineq, sosprogram, sossolve

    def ask(p, symbols, seconds):
        program = sosineq(sosprogram(symbols), p.as_expr())
        program = sossolve(program, {"solver": "cvxopt"}, 0)
        info = program.solinfo["info"]
        said = info.get("status", "nothing") if isinstance(info, dict) else "nothing"
        size = program.extravar["Z"][0].shape[0] if program.extravar.get("Z") else None
        return {"verdict": "numeric" if said == "optimal" else f"unknown: {said}", "basis": size}

    return ask


if __name__ == "__main__":
    main()
