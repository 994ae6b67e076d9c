"""Planted faults: how many of them each method's own tests notice.

    python benchmarks/mutants.py [ID ...]

Small wrong changes to a method's file, one at a time; contract checks and golden vectors run against
each. Goal: at least 95 % noticed. Methods not named keep their earlier figures. What is not noticed is
listed with its line: it needs a test, or changes nothing and says why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

from luthier.catalogue import cards, source_hash
from luthier.testing.mutants import GOAL, hunt

RESULT = Path(__file__).parent / "results" / "mutants.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("id", nargs="*", help="methods; all of them if none is named")
    ids = parser.parse_args().id
    for id_ in ids or sorted(cards()):
        found = hunt(id_)
        print("\n".join(found.lines()), flush=True)
        rows = earlier()  # hunts that run side by side keep each other's
        rows[id_] = {
            "id": id_, "planted": found.tried, "noticed": found.noticed,
            "share": round(found.share, 4), "first noticed by": found.by,
            "not noticed": [f"line {m.line}: {m.what}" for m in found.survivors],
            "changes nothing": [f"line {m.line}: {m.what}: {why}" for m, why in found.harmless],
            "source": source_hash(id_), "date": str(datetime.date.today()),
        }  # fmt: skip
        write(sorted(rows.values(), key=lambda r: r["id"]))
    planted, noticed = (sum(r[k] for r in earlier().values()) for k in ("planted", "noticed"))
    print(f"together: {noticed} of {planted} ({noticed / planted:.1%}), goal {GOAL:.0%}")


def earlier() -> dict[str, dict]:
    return {row["id"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.exists() else {}


def write(rows: list[dict]) -> None:
    packages = {n: version(n) for n in ("torch", "transformers", "luthier")}
    result = {
        "benchmark": "mutants", "command": "python benchmarks/mutants.py", "date": max(r["date"] for r in rows),
        "goal": f"at least {GOAL:.0%} of the planted faults noticed by a method's own tests",
        "versions": {"python": platform.python_version(), **packages},
        "machine": platform.machine(), "rows": rows,
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
