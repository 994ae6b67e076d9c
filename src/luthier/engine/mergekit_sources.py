"""Which models a mergekit file merges, and where in it the parameters of each stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.engine.mergekit_numbers import Marked, Path, Site, at
from luthier.errors import LuthierError, said, unknown

MOST_LAYERS = 10_000
"""of a model; what a slice takes of them is written out layer by layer"""
WHOLE = ("linear", "passthrough")
"""Methods that merge models rather than changes, so that the base is one of them."""


class Sources:
    """The models that are merged and where the parameters of each stand. The base is no expert of itself.

    parameters: of the method.  sites: for each expert, then for what holds for all of them, in `common`.
    slices: in our grammar.  places: what of the recipe's step comes from where in the file.
    """

    def __init__(self, marked: Marked, method: str, parameters: Sequence[str]):
        self.marked, self.method, self.parameters = marked, method, parameters
        self.experts: list[str] = []
        self.sites: list[list[Site]] = []
        self.common: list[Site] = []
        self.slices: list[dict[str, list[int]]] = []
        self.places: dict[Path, Path] = {}
        self._base_counts = method in WHOLE
        self.base = self._base()
        if (marked.value.get("models") is None) == (marked.value.get("slices") is None):
            place = marked.where("slices" if marked.value.get("slices") is not None else "models")
            raise LuthierError("expected a list of models", where=place, do="give models or slices, one of them")
        self._models() if marked.value.get("slices") is None else self._slices()
        if method == "passthrough" and max(map(len, self.slices or [self.experts])) > 1:
            do = "a slice of a passthrough has one source, and a base_model is one"
            raise LuthierError("passthrough merges nothing", where=marked.where("merge_method"), do=do)
        if not self.experts:
            place = marked.where("models" if marked.value.get("slices") is None else "slices")
            raise LuthierError("there is nothing to merge but the base", where=place)

    def _base(self) -> str | None:
        """The base, or the model that all adapters stand on where a method of whole models names none."""
        if self.marked.value.get("base_model") is not None:
            name, adapter = reference(self.marked, ("base_model",))
            if adapter:
                raise _elsewhere(self.marked, ("base_model",), name, adapter)
            self.places[("base",)] = ("base_model",)
            return name
        if not self._base_counts:
            raise LuthierError(f"{self.method} needs a base_model", where=self.marked.where("merge_method"))
        return None

    def _models(self) -> None:
        marked, seen = self.marked, set[str]()
        for path in entries(marked, ("models",), "models"):
            model, own = self._source(path, ("model", "parameters"))
            if model in seen:
                do = "give it once, with the sum of its weights"
                raise LuthierError(f"{model!r} stands twice", where=marked.where(*path, "model"), do=do)
            seen.add(model)
            if self._base_counts or model != self.base:
                self._expert(model, (*path, "model")).append(Site((own, ("parameters",))))
        base = self.base if marked.value.get("base_model") is not None else None
        if self._base_counts and base is not None and base not in seen:  # mergekit adds it, with the file's parameters
            self._expert(base, ("base_model",)).append(Site((("parameters",),), named=("base_model",)))
        self.common = [Site((("parameters",),))]

    def _slices(self) -> None:
        marked, slices = self.marked, entries(self.marked, ("slices",), "slices")
        start = 0
        for number, path in enumerate(slices):
            entry = a_map(marked, path, ("sources", "parameters"), ("base_model", "residual_weight"))
            if entry.get("parameters") is not None:
                a_map(marked, (*path, "parameters"), self.parameters)
            self.places[("slices", number)] = path
            layers: dict[str, list[int]] = {}
            found: list[tuple[str, Path, Path]] = []
            for source in entries(marked, (*path, "sources"), "sources"):
                model, own = self._source(source, ("model", "layer_range", "parameters"))
                if model in layers:
                    do = "a model may stand once in a slice"
                    raise LuthierError(f"{model!r} stands twice", where=marked.where(*source), do=do)
                layers[model] = _range(marked, (*source, "layer_range"))
                self.places[("slices", number, model)] = (*source, "layer_range")
                found.append((model, own, (*source, "model")))
            count = layers[found[0][0]][1] - layers[found[0][0]][0]
            inner = ((*path, "parameters"), ("parameters",))
            common = Site(inner, start, count, before=number == 0, after=number == len(slices) - 1)
            for model, own, place in found:
                if self._base_counts or model != self.base:
                    site = replace(common, scopes=(own, *inner), origin=layers[model][0])
                    self._expert(model, place).append(site)
            self.common.append(common)
            self.slices.append(layers)
            start += count

    def _expert(self, model: str, place: Path) -> list[Site]:
        """The sites of a model, which is an expert from now on."""
        if model not in self.experts:
            self.places[("experts", len(self.experts))] = place
            self.experts.append(model)
            self.sites.append([])
        return self.sites[self.experts.index(model)]

    def _source(self, path: Path, known: Sequence[str]) -> tuple[str, Path]:
        """The model of one entry, or the adapter that is put on the base; and where its own parameters stand."""
        entry = a_map(self.marked, path, known)
        own = (*path, "parameters")
        if entry.get("parameters") is not None:
            a_map(self.marked, own, self.parameters)
        name, adapter = reference(self.marked, (*path, "model"))
        if adapter is None:
            return name, own
        if self.base is None:
            self.base, self.places[("base",)] = name, (*path, "model")
        if name != self.base:
            raise _elsewhere(self.marked, (*path, "model"), name, adapter)
        return adapter, own


def reference(marked: Marked, path: Path) -> tuple[str, str | None]:
    """The model at a path and the adapter that goes with it, written MODEL+ADAPTER or as a map."""
    value = at(marked.value, path)
    if isinstance(value, dict):
        a_map(marked, path, ("model", "lora"), ("override_architecture",))
        adapter = _folder(marked, (*path, "lora"), value["lora"]) if value.get("lora") is not None else None
        return _folder(marked, (*path, "model"), value.get("model")), adapter
    if not isinstance(value, str) or value.count("+") != 1:
        return _folder(marked, path, value), None
    model, adapter = value.split("+")
    return _folder(marked, path, model), _folder(marked, path, adapter)


def _folder(marked: Marked, path: Path, value: Any) -> str:
    if isinstance(value, dict):
        entry = a_map(marked, path, ("path", "revision"))
        path, value = (*path, "path"), entry.get("path")
        if entry.get("revision") is not None:
            value = f"{value}@{entry['revision']}"
    if not isinstance(value, str) or not value:
        raise LuthierError("expected the name of a model", where=marked.where(*path))
    if "+" in value or "@" in value:
        do = "give a folder of that revision" if "@" in value else "give MODEL+ADAPTER"
        raise LuthierError(f"{value!r} is more than a name", where=marked.where(*path), do=do)
    return value


def _elsewhere(marked: Marked, path: Path, model: str, adapter: str) -> LuthierError:
    what = f"the adapter {adapter!r} is for {model!r}, and only adapters of one base_model are merged here"
    do = f"merge it into {model!r} first, and give the folder of the result"
    return LuthierError(what, where=marked.where(*path), do=do)


def entries(marked: Marked, path: Path, what: str) -> list[Path]:
    """The paths of a list's entries, of which there are some."""
    listed = at(marked.value, path)
    if not isinstance(listed, list) or not listed:
        raise LuthierError(f"expected a list of {what}", where=marked.where(*path))
    return [(*path, i) for i in range(len(listed))]


def _range(marked: Marked, path: Path) -> list[int]:
    value = at(marked.value, path)
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
        raise LuthierError(f"expected [FIRST, PAST THE LAST], got {said(value)}", where=marked.where(*path))
    if not 0 <= value[0] < value[1] <= MOST_LAYERS:
        raise LuthierError(f"there are no layers {value}", where=marked.where(*path))
    return value


def a_map(marked: Marked, path: Path, known: Sequence[str], refused: Sequence[str] = ()) -> Mapping[str, Any]:
    """The map at `path`, with no key but the known."""
    value = at(marked.value, path)
    if not isinstance(value, dict):
        raise LuthierError("expected a map", where=marked.where(*path))
    for key in value:
        if key in refused:
            do = "drop it" if key == "chat_template" else "use mergekit for it"
            raise LuthierError(f"{key!r} is not taken over", where=marked.where(*path, key), do=do)
        if key not in known:
            raise unknown("key", str(key), known, where=marked.where(*path, key))
    return value
