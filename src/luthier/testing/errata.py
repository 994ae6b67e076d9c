"""The errata page: where published code contradicts its paper, generated from the methods' `departures`."""

from __future__ import annotations

from pathlib import Path

from luthier.catalogue import cards

HEAD = """# Errata

Where published code contradicts its paper, and what that means for a user. Our methods follow the
paper; each line names the upstream version and the test here that shows the difference.

This page is generated from the `departures` of the methods by `python -m luthier.testing.errata FILE`.
"""


def build() -> str:
    """The page as Markdown: a heading a method that lists departures, a line each."""
    parts = [HEAD]
    for id_, entry in sorted(cards().items()):
        if entry.departures and entry.module.startswith("luthier."):
            paper = f" ({entry.paper})" if entry.paper else ""
            parts.append(f"## `{id_}`{paper}\n\n" + "".join(f"- {line}\n" for line in entry.departures))
    return "\n".join(parts)


if __name__ == "__main__":
    import sys

    Path(sys.argv[1]).write_text(build(), encoding="utf-8")
