"""Write the generated parts of the docs: the table of methods, the quick start's output, the errata.

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
    verdicts = json.loads(path.read_text())["verdicts"] if path.exists() else {}
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


def main() -> None:
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(), run))
    (ROOT / "docs" / "errata.md").write_text(errata())


if __name__ == "__main__":
    main()
