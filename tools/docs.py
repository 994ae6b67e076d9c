"""Write the generated parts of the docs: the table of methods, the quick start's output, errata, benchmarks.

usage: python tools/docs.py [RUN]      (RUN: the folder of a quick start; without it that part stays)
"""

import json
import re
import sys
from pathlib import Path

from luthier.catalogue import cards
from luthier.testing.errata import build as errata

ROOT = Path(__file__).resolve().parent.parent


def methods_table() -> str:
    path = ROOT / "docs" / "verdicts.json"
    rows = json.loads(path.read_text())["verdicts"] if path.exists() else []
    verdicts = {row["id"]: row for row in rows}
    lines = ["| id | what it does | paper | verdict |", "| --- | --- | --- | --- |"]
    for id_, card in sorted(cards().items()):
        what = card.summary.split(":", 1)[-1].strip().rstrip(".")
        word = verdicts.get(id_, {}).get("verdict", "not run")
        lines.append(f"| `{id_}` | {what} | {card.paper or ''} | {word} |")
    return "\n".join(lines)


def put(text: str, mark: str, body: str) -> str:
    """`text` with what stands between the marks replaced."""
    pattern = rf"(<!-- {mark}:begin -->\n).*?(<!-- {mark}:end -->)"
    return re.sub(pattern, lambda m: m.group(1) + body + "\n" + m.group(2), text, flags=re.S)


def readme(text: str, run: Path | None = None) -> str:
    text = put(text, "methods", methods_table())
    if run is not None:
        from luthier.report import markdown

        text = put(text, "quickstart", markdown(run))
    return text


def benchmarks() -> str:
    """One section a file of benchmarks/results, as the scripts wrote them."""
    lines = [
        "# Benchmarks", "",
        "Ratios within one run, on the machine named; absolute times mean little elsewhere. This page is generated "
        "by `python tools/docs.py` from `benchmarks/results/`, which the scripts in `benchmarks/` write.",
    ]  # fmt: skip
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        raw = json.loads(path.read_text())
        versions = ", ".join(f"{k} {v}" for k, v in raw["versions"].items())
        lines += ["", f"## {raw['benchmark']}", "", f"`{raw['command']}`, {raw['date']}; {versions}.", ""]
        lines += [f"Goal: {goal}." for goal in ([raw["goal"]] if isinstance(raw["goal"], str) else raw["goal"])]
        lines += [f"Note: {note}" for note in raw.get("notes", [])]
        hidden = ("source", "first noticed by")
        columns = list(dict.fromkeys(k for row in raw["rows"] for k in row if k not in hidden))
        lines += ["", "| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(shown(row.get(c, "")) for c in columns) + " |" for row in raw["rows"]]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(" ".join(str(v).split()).replace("|", "\\|") for v in value)
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 100 else str(value)


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), run))
    (ROOT / "docs" / "errata.md").write_text(errata())
    (ROOT / "docs" / "benchmarks.md").write_text(benchmarks())


if __name__ == "__main__":
    main()
