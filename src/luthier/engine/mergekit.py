"""mergekit's YAML as a recipe, for the methods both have.

What it says is kept: models or slices of layers, weights, densities and the like as numbers, gradients or
lists of filters, shares taken tensor by tensor and weights in the vote, as mergekit does, and the tokenizer.
Two things differ: sums are in fp32 whatever `dtype` says, which then is the output's only; and what DARE and
DELLA drop at random is other entries. What cannot be kept is refused with its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.engine.mergekit_numbers import Marked, Path, Site, at, setting
from luthier.errors import LuthierError, said, unknown

KEYS = (
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer",
)  # fmt: skip
OTHERS = ("modules", "chat_template")
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MIXED = ("weight", "density", "lambda", "normalize", "rescale", "int8_mask")


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
    "linear": Way("merge.linear", {}, ("weight", "normalize"), normalize=True),
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
MOST_LAYERS = 10_000
"""of a model; what a slice takes of them is written out layer by layer"""
WHOLE = ("linear", "passthrough")
"""Methods that merge models rather than changes, so that the base is one of them."""


def to_recipe(marked: Marked) -> dict[str, Any]:
    """The recipe, as plain values, with the one step `merged`. LuthierError names file and line."""
    top = _map(marked, (), KEYS, OTHERS)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        raise unknown("merge_method", str(method), METHODS, where=marked.where("merge_method"))
    way = METHODS[method]
    base = _model(marked, ("base_model",), None) if top.get("base_model") is not None else None
    if base is None and method not in WHOLE:
        raise LuthierError(f"{method} needs a base_model", where=marked.where("merge_method"))
    sources = _Sources(marked, method, way, base)
    if top.get("parameters") is not None:
        _map(marked, ("parameters",), way.parameters)
    fields = _fields(marked, method, way, sources)
    step = {"use": way.use, **({"base": base} if base else {}), "experts": sources.experts, "set": fields}
    if sources.slices:
        step["slices"] = sources.slices
    step |= _tokenizer(marked, base, sources)
    dtype = "out_dtype" if top.get("out_dtype") is not None else "dtype"
    if top.get(dtype) is not None:
        if not isinstance(top[dtype], str) or top[dtype] not in DTYPES:
            raise unknown("dtype", str(top[dtype]), DTYPES, where=marked.where(dtype))
        step["dtype"] = DTYPES[top[dtype]]
    return {"luthier": 1, "steps": {"merged": step}}


class _Sources:
    """The models that are merged and where the parameters of each stand. The base is no expert of itself.

    sites: for each expert, then for what holds for all of them, in `common`.  slices: in our grammar.
    """

    def __init__(self, marked: Marked, method: str, way: Way, base: str | None):
        self.marked, self.way, self.base = marked, way, base
        self.experts: list[str] = []
        self.sites: list[list[Site]] = []
        self.common: list[Site] = []
        self.slices: list[dict[str, list[int]]] = []
        self._base_counts = method in WHOLE
        if (marked.value.get("models") is None) == (marked.value.get("slices") is None):
            place = marked.where("slices" if marked.value.get("slices") is not None else "models")
            raise LuthierError("expected a list of models", where=place, do="give models or slices, one of them")
        self._models() if marked.value.get("slices") is None else self._slices()
        if method == "passthrough" and max(map(len, self.slices or [self.experts])) > 1:
            do = "a slice of a passthrough has one source"
            raise LuthierError("passthrough merges nothing", where=marked.where("merge_method"), do=do)
        if not self.experts:
            place = marked.where("models" if marked.value.get("slices") is None else "slices")
            raise LuthierError("there is nothing to merge but the base", where=place)

    def _models(self) -> None:
        for path in _entries(self.marked, ("models",), "models"):
            model, own = self._source(path, ("model", "parameters"))
            if self._base_counts or model != self.base:
                self.experts.append(model)
                self.sites.append([Site((own, ("parameters",)))])
        self.common = [Site((("parameters",),))]

    def _slices(self) -> None:
        marked, slices = self.marked, _entries(self.marked, ("slices",), "slices")
        start = 0
        for number, path in enumerate(slices):
            entry = _map(marked, path, ("sources", "parameters"), ("base_model", "residual_weight"))
            if entry.get("parameters") is not None:
                _map(marked, (*path, "parameters"), self.way.parameters)
            layers: dict[str, list[int]] = {}
            found: list[tuple[str, Path]] = []
            for source in _entries(marked, (*path, "sources"), "sources"):
                model, own = self._source(source, ("model", "layer_range", "parameters"))
                if model in layers:
                    do = "a model may stand once in a slice"
                    raise LuthierError(f"{model!r} stands twice", where=marked.where(*source), do=do)
                layers[model] = _range(marked, (*source, "layer_range"))
                found.append((model, own))
            count = layers[found[0][0]][1] - layers[found[0][0]][0]
            ends = {"before": number == 0, "after": number == len(slices) - 1}
            inner = ((*path, "parameters"), ("parameters",))
            for model, own in found:
                if self._base_counts or model != self.base:
                    if model not in self.experts:
                        self.experts.append(model)
                        self.sites.append([])
                    site = Site((own, *inner), start, count, **ends, origin=layers[model][0])
                    self.sites[self.experts.index(model)].append(site)
            self.common.append(Site(inner, start, count, **ends))
            self.slices.append(layers)
            start += count

    def _source(self, path: Path, known: Sequence[str]) -> tuple[str, Path]:
        """The model of one entry, and where its own parameters stand."""
        entry = _map(self.marked, path, known)
        own = (*path, "parameters")
        if entry.get("parameters") is not None:
            _map(self.marked, own, self.way.parameters)
        return _model(self.marked, (*path, "model"), self.base), own


def _fields(marked: Marked, method: str, way: Way, sources: _Sources) -> dict[str, Any]:
    """The method's fields, from the parameters of each model and those of the file."""
    if method == "slerp":
        return {"t": setting(marked, sources.common, "t", None)}
    if method == "model_stock":
        return {"filter_wise": _flag(marked, "filter_wise", False)}
    name = "scale" if method == "passthrough" else "weight"
    default = 1.0 if method == "passthrough" else None
    weights = [setting(marked, sites, name, default) for sites in sources.sites]
    if method == "passthrough":
        return {"weights": weights, **way.fields}
    normalize = _flag(marked, "normalize", way.normalize)
    if method == "task_arithmetic":
        fields: dict[str, Any] = {"weights": _shares(marked, weights) if normalize else weights}
    else:
        fields = {"weights": weights, "normalize": normalize}
    if method != "linear":
        fields["scale"] = setting(marked, sources.common, "lambda", 1.0)
        rescale = _flag(marked, "rescale", way.rescale)
        if way.rescale:
            fields["rescale"] = "l1" if rescale else "none"
        elif rescale:
            place = marked.where("parameters", "rescale")
            raise LuthierError(f"{method} is not rescaled here", where=place, do="drop it")
    for one, many, fallback in (
        ("density", "densities", 1.0),
        ("gamma", "gammas", 0.01),
        ("epsilon", "epsilons", 0.15),
    ):
        if one in way.parameters and method not in ("linear", "task_arithmetic"):
            values = [setting(marked, sites, one, fallback) for sites in sources.sites]
            if one == "epsilon":  # at density 1 mergekit drops nothing, whatever epsilon says
                whole = fields.get("densities") or [fields["density"]] * len(values)
                values = [0.0 if d == 1.0 else v for d, v in zip(whole, values, strict=True)]
            fields |= {one: values[0]} if all(v == values[0] for v in values) else {many: values}
    return fields | dict(way.fields)


def _tokenizer(marked: Marked, base: str | None, sources: _Sources) -> dict[str, Any]:
    """Whose vocabulary: base, union or a model's, and what it is padded to."""
    top, path = marked.value, ("tokenizer_source",)
    name, multiple = top.get("tokenizer_source"), None
    if top.get("tokenizer") is not None:
        entry = _map(marked, ("tokenizer",), ("source", "pad_to_multiple_of"), ("tokens",))
        path, name, multiple = ("tokenizer", "source"), entry.get("source", "union"), entry.get("pad_to_multiple_of")
    if name is None:
        return {}
    first = base or sources.experts[0]
    if name == "base" or name == first:
        name = "base" if base else first
    elif name != "union" and name not in sources.experts:
        raise unknown("tokenizer", str(name), ("base", "union", *sources.experts), where=marked.where(*path))
    return {"tokenizer": {"source": name, "pad_to_multiple_of": multiple} if multiple is not None else name}


def _entries(marked: Marked, path: Path, what: str) -> list[Path]:
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


def _shares(marked: Marked, weights: list[Any]) -> list[float]:
    """Weights divided by their sum, which must then be the same for every tensor."""
    if not all(isinstance(w, float) for w in weights):
        where = marked.where("parameters", "normalize")
        raise LuthierError("normalize needs plain weights in task arithmetic", where=where, do="write shares instead")
    total = sum(weights)
    return [w / total for w in weights] if abs(total) >= 1e-8 else weights


def _flag(marked: Marked, name: str, default: bool) -> bool:
    value = (marked.value.get("parameters") or {}).get(name, default)
    if not isinstance(value, bool):
        raise LuthierError(f"expected true or false, got {value!r}", where=marked.where("parameters", name))
    return value


def _model(marked: Marked, path: Path, base: str | None) -> str:
    """The name of a model; of `BASE+ADAPTER` the adapter's folder, since adapters stand on the base."""
    name = at(marked.value, path)
    if not isinstance(name, str):
        raise LuthierError("expected the name of a model", where=marked.where(*path))
    if base is not None and name.startswith(f"{base}+"):
        name = name.removeprefix(f"{base}+")
    if "+" in name or "@" in name:
        do = "give the adapter's folder as the model" if "+" in name else "give a folder of that revision"
        raise LuthierError(f"{name!r} is more than a name", where=marked.where(*path), do=do)
    return name


def _map(marked: Marked, path: Path, known: Sequence[str], refused: Sequence[str] = ()) -> Mapping[str, Any]:
    """The map at `path`, with no key but the known."""
    value = at(marked.value, path)
    if not isinstance(value, dict):
        raise LuthierError("expected a map", where=marked.where(*path))
    for key in value:
        if key in refused:
            do = "use mergekit for it" if key in ("modules", "residual_weight", "base_model") else "drop it"
            raise LuthierError(f"{key!r} is not taken over", where=marked.where(*path, key), do=do)
        if key not in known:
            raise unknown("key", str(key), known, where=marked.where(*path, key))
    return value
