"""mergekit's YAML as a recipe, for the methods both have.

What it says is kept: models or slices of layers, weights, densities and the like as numbers, gradients or
lists of filters, shares taken tensor by tensor and weights in the vote, as mergekit does, and the tokenizer.
Four things differ: sums are in fp32 whatever `dtype` says, which then is the output's only; where no dtype is
given the output has the first model's, mergekit's the widest (a note says so where they differ); what DARE and
DELLA drop at random is other entries; and where entries of a change are equal at the cut of a trim, which
among bf16 checkpoints many are, all of them stay and mergekit takes exactly its count. What cannot be kept is
refused with its line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.engine.mergekit_numbers import Marked, Path, flag, setting, stands
from luthier.engine.mergekit_sources import Sources, a_map, reference
from luthier.errors import LuthierError, unknown

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
IDLE_KEYS = ("name", "random_seed")
"""mergekit does not look at these, nor at what begins with x-, which holds anchors."""
OTHERS = ("modules", "chat_template")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
IDLE = ("int8_mask", "normalize", "rescale", "embed_slerp")
"""Switches that change nothing under a method that has no use for them."""
MIXED = ("weight", "density", "lambda")


@dataclass(frozen=True)
class Way:
    """One of mergekit's methods: ours, the fields that make it the same, its parameters, and two of its defaults."""

    use: str
    fields: Mapping[str, Any]
    parameters: tuple[str, ...] = MIXED
    normalize: bool = False
    rescale: bool = False


_CRUMBS = (*MIXED, "gamma")
_DELLA = (*MIXED, "epsilon")
METHODS = {
    "linear": Way("merge.linear", {}, ("weight",), normalize=True),
    "passthrough": Way("merge.linear", {"normalize": False}, ("scale",)),
    "slerp": Way("merge.slerp", {}, ("t",)),
    "model_stock": Way("merge.model_stock", {}, ("filter_wise",)),
    "task_arithmetic": Way("merge.task_arithmetic", {}),
    "ties": Way("merge.ties", {"scope": "tensor", "on_tie": "plus"}, normalize=True),
    "dare_linear": Way("merge.dare", {"vote": "none"}, rescale=True),
    "dare_ties": Way("merge.dare", {"vote": "plus"}, rescale=True),
    "breadcrumbs": Way("merge.breadcrumbs", {"scope": "tensor", "vote": "none"}, _CRUMBS),
    "breadcrumbs_ties": Way("merge.breadcrumbs", {"scope": "tensor", "vote": "plus"}, _CRUMBS),
    "della": Way("merge.della", {"vote": "plus"}, _DELLA, normalize=True, rescale=True),
    "della_linear": Way("merge.della", {"vote": "none"}, _DELLA, rescale=True),
}
SPARSE = (("density", "densities", 1.0), ("gamma", "gammas", 0.01), ("epsilon", "epsilons", 0.15))
"""What each change is thinned by: a parameter, our field of one an expert, mergekit's default."""


def to_recipe(marked: Marked) -> Any:
    """The recipe, as values marked like these, with the one step `merged`. LuthierError names file and line."""
    idle = [k for k in marked.value or () if isinstance(k, str) and (k in IDLE_KEYS or k.startswith("x-"))]
    top = a_map(marked, (), (*KEYS, *idle), OTHERS)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        raise unknown("merge_method", str(method), METHODS, where=marked.where("merge_method"))
    way = METHODS[method]
    if top.get("parameters") is not None:
        a_map(marked, ("parameters",), (*way.parameters, *IDLE))
    sources = Sources(marked, method, (*way.parameters, *IDLE))
    places: dict[Path, Path] = {(): ("merge_method",), ("set",): ("parameters",), **sources.places}
    step = {"use": way.use, **({"base": sources.base} if sources.base else {}), "experts": sources.experts}
    step["set"] = _Fields(marked, method, way, sources, places).made
    if sources.slices:
        step["slices"] = sources.slices
    step |= _tokenizer(marked, sources, places)
    dtype = "out_dtype" if top.get("out_dtype") is not None else "dtype"
    if top.get(dtype) is not None:
        word = str(top[dtype]).removeprefix("torch.")
        if word not in DTYPES:
            raise unknown("dtype", word, DTYPES, where=marked.where(dtype))
        step["dtype"], places[("dtype",)] = DTYPES[word], (dtype,)
    places[("experts",)] = ("slices",) if sources.slices else ("models",)
    return marked.moved(
        {"luthier": 1, "steps": {"merged": step}}, {("steps", "merged", *k): v for k, v in places.items()}
    )


class _Fields:
    """The method's fields, from the parameters of each model and those of the file."""

    def __init__(self, marked: Marked, method: str, way: Way, sources: Sources, places: dict[Path, Path]):
        self.marked, self.sources, self.places = marked, sources, places
        self.made: dict[str, Any] = dict(way.fields)
        if method == "slerp":
            self._shared("t", "t", None)
        elif method == "model_stock":
            self.made["filter_wise"] = self._flag("filter_wise", False)
        elif method == "passthrough":
            self._each("weights", "scale", 1.0)
        else:
            self._each("weights", "weight", None)
            self._mixed(method, way)

    def _mixed(self, method: str, way: Way) -> None:
        normalize = self._flag("normalize", way.normalize)
        if method != "task_arithmetic":
            self.made["normalize"] = normalize
        elif normalize:
            where = self.marked.where(*(stands(self.marked, self.sources.common, "normalize") or ()))
            self.made["weights"] = _shares(where, self.made["weights"])
        if method == "linear":
            return
        self._shared("scale", "lambda", 1.0)
        rescale = self._flag("rescale", way.rescale)
        if way.rescale:
            self.made["rescale"] = "l1" if rescale else "none"
        elif rescale and method != "task_arithmetic":
            where = self.marked.where(*self.places[("set", "rescale")])
            raise LuthierError(f"{method} is not rescaled here", where=where, do="drop it")
        for one, many, default in SPARSE:
            if one in way.parameters and method != "task_arithmetic":
                values = self._each(many, one, default)
                if one == "epsilon":  # at density 1 mergekit drops nothing, whatever epsilon says
                    whole = self.made.get("densities") or [self.made["density"]] * len(values)
                    values = [0.0 if d == 1.0 else v for d, v in zip(whole, values, strict=True)]
                    self.made[many] = values
                if all(v == values[0] for v in values):
                    del self.made[many]
                    self.made[one] = values[0]
                elif one == "density":  # the likelier fault where no single field is at fault
                    self._came(("set",), self.places.get(("set", many)))

    def _shared(self, field: str, name: str, default: float | None) -> None:
        self.made[field] = setting(self.marked, self.sources.common, name, default)
        self._came(("set", field), stands(self.marked, self.sources.common, name))

    def _each(self, field: str, name: str, default: float | None) -> list[Any]:
        """One an expert."""
        self.made[field] = [setting(self.marked, sites, name, default) for sites in self.sources.sites]
        for sites in reversed(self.sources.sites):  # the line of the first that is given
            for key in (field, name):
                self._came(("set", key), stands(self.marked, sites, name))
        return self.made[field]

    def _flag(self, name: str, default: bool) -> bool:
        self._came(("set", name), stands(self.marked, self.sources.common, name))
        return flag(self.marked, self.sources.common, name, default)

    def _came(self, path: Path, place: Path | None) -> None:
        if place is not None:
            self.places[path] = place


def _tokenizer(marked: Marked, sources: Sources, places: dict[Path, Path]) -> dict[str, Any]:
    """Whose vocabulary: base, union or a model's, and what it is padded to."""
    top, path = marked.value, ("tokenizer_source",)
    name, multiple = top.get("tokenizer_source"), None
    if top.get("tokenizer") is not None:
        if name is not None:
            do = "give one of them"
            raise LuthierError("tokenizer and tokenizer_source both stand here", where=marked.where("tokenizer"), do=do)
        entry = a_map(marked, ("tokenizer",), ("source", "pad_to_multiple_of"), ("tokens",))
        path, multiple = ("tokenizer", "source"), entry.get("pad_to_multiple_of")
        name = entry.get("source", "union")
        places[("tokenizer", "pad_to_multiple_of")] = ("tokenizer", "pad_to_multiple_of")
    if name is None:
        return {}
    places[("tokenizer",)] = path
    base, first = sources.base, sources.base or sources.experts[0]
    if name not in ("base", "union"):
        name = reference(marked, path)[0]
    if name == "base" or name == first:
        name = "base" if base else first
    elif name != "union" and name not in sources.experts:
        raise unknown("tokenizer", str(name), ("base", "union", *sources.experts), where=marked.where(*path))
    return {"tokenizer": {"source": name, "pad_to_multiple_of": multiple} if multiple is not None else name}


def _shares(where: str, weights: list[Any]) -> list[float]:
    """Weights divided by their sum, which must then be the same for every tensor."""
    if not all(isinstance(w, float) for w in weights):
        raise LuthierError("normalize needs plain weights in task arithmetic", where=where, do="write shares instead")
    total = sum(weights)
    return [w / total for w in weights] if abs(total) >= 1e-8 else weights
