"""Methods of another package, one for each shape, that keep every promise until a test breaks them."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from luthier import catalogue

HERE = Path(__file__).parent


class Toys:
    """Writes toy modules and enrols them through the entry-point group, as another package would."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch, self.points, self.made = folder, patch, [], 0
        patch.syspath_prepend(str(folder))
        patch.setattr(importlib.metadata, "entry_points", lambda group: self.points)
        catalogue.cards.cache_clear()

    def enrol(self, id_: str, toy: str, *edits: tuple[str, str]) -> catalogue.Card:
        """The card of the toy method under `id_`, after replacing text in its source."""
        return self._enrol(id_, toy, HERE / f"{toy}.py", "Toy", edits)

    def copy(self, id_: str, of: str, *edits: tuple[str, str]) -> catalogue.Card:
        """The same with a copy of one of our own methods, under another id."""
        self.points = []
        catalogue.cards.cache_clear()
        card = catalogue.card(of)
        return self._enrol(id_, of.replace(".", "_"), card.path, card.cls, edits)

    def _enrol(self, id_: str, toy: str, path: Path, cls: str, edits: tuple[tuple[str, str], ...]) -> catalogue.Card:
        text = path.read_text(encoding="utf-8")
        for old, new in edits:
            assert old in text, f"{toy} has no {old!r} to break"
            text = text.replace(old, new, 1)
        self.made += 1
        module = f"toy_{toy}_{self.made}_{abs(hash(str(self.folder)))}"
        (self.folder / f"{module}.py").write_text(text, encoding="utf-8")
        self.points = [importlib.metadata.EntryPoint(id_, f"{module}:{cls}", "luthier.methods")]
        catalogue.cards.cache_clear()
        return catalogue.card(id_)

    def close(self) -> None:
        self.patch.undo()
        catalogue.cards.cache_clear()
        for name in [n for n in sys.modules if n.startswith("toy_")]:
            del sys.modules[name]
