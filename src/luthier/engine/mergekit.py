"""mergekit's YAML as a recipe, for the methods both have: linear, task_arithmetic and ties.

What it says is kept: weights, densities and lambda as numbers, gradients over depth or lists of filters,
ties trimmed tensor by tensor with weights in the vote, tensors outside the layers at a gradient's first
value. One thing differs: sums are in fp32 whatever `dtype` says, which then is the output's only.
What cannot be kept is refused with its line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from luthier.errors import LuthierError, unknown

METHODS = {"linear": "merge.linear", "task_arithmetic": "merge.task_arithmetic", "ties": "merge.ties"}
KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
OTHERS = ("slices", "modules", "tokenizer", "chat_template")
PARAMETERS = {
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "lambda", "normalize", "int8_mask"),
    "ties": ("weight", "density", "lambda", "normalize", "int8_mask"),
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
INSIDE = ("*layers.*", "*h.[0-9]*")
"""Globs of the tensors inside layers, in the families we know."""
Path = tuple[Any, ...]


class Marked(Protocol):
    """Plain values that remember their lines, as `recipe_text.read` gives them."""

    value: Any

    def where(self, *path: Any) -> str: ...


def to_recipe(marked: Marked) -> dict[str, Any]:
    """The recipe, as plain values, with the one step `merged`. LuthierError names file and line."""
    top = _map(marked, (), KEYS, OTHERS)
    method = top.get("merge_method")
    if not isinstance(method, str) or method not in METHODS:
        raise unknown("merge_method", str(method), METHODS, where=marked.where("merge_method"))
    base = _model(marked, ("base_model",)) if top.get("base_model") is not None else None
    if base is None and method != "linear":
        raise LuthierError(f"{method} needs a base_model", where=marked.where("merge_method"))
    if top.get("tokenizer_source") not in (None, "base", base):
        do = "drop it: the base's tokenizer is kept"
        raise LuthierError("no other tokenizer is put on", where=marked.where("tokenizer_source"), do=do)
    experts, scopes = _experts(marked, method, base)
    fields = _fields(marked, method, scopes)
    step = {"use": METHODS[method], **({"base": base} if base else {}), "experts": experts, "set": fields}
    dtype = "out_dtype" if top.get("out_dtype") is not None else "dtype"
    if top.get(dtype) is not None:
        if not isinstance(top[dtype], str) or top[dtype] not in DTYPES:
            raise unknown("dtype", str(top[dtype]), DTYPES, where=marked.where(dtype))
        step["dtype"] = DTYPES[top[dtype]]
    return {"luthier": 1, "steps": {"merged": step}}


def _experts(marked: Marked, method: str, base: str | None) -> tuple[list[str], list[Path]]:
    """The models that are merged, and where each one's parameters stand. The base is no expert of itself."""
    listed = marked.value.get("models")
    if not isinstance(listed, list) or not listed:
        raise LuthierError("expected a list of models", where=marked.where("models"))
    found = []
    for i in range(len(listed)):
        entry = _map(marked, ("models", i), ("model", "parameters"))
        model = _model(marked, ("models", i, "model"))
        if entry.get("parameters") is not None:
            _map(marked, ("models", i, "parameters"), PARAMETERS[method])
        if method == "linear" or model != base:
            found.append((model, ("models", i, "parameters")))
    if not found:
        raise LuthierError("there is nothing to merge but the base", where=marked.where("models"))
    return [model for model, _ in found], [path for _, path in found]


def _fields(marked: Marked, method: str, scopes: Sequence[Path]) -> dict[str, Any]:
    """The method's fields, from the parameters of each model and those of the file."""
    if marked.value.get("parameters") is not None:
        _map(marked, ("parameters",), PARAMETERS[method])
    weights = [_setting(marked, [scope, ("parameters",)], "weight", None) for scope in scopes]
    normalize = _flag(marked, "normalize", method != "task_arithmetic")
    if method == "task_arithmetic":
        fields: dict[str, Any] = {"weights": _shares(marked, weights) if normalize else weights}
    else:
        fields = {"weights": weights, "normalize": normalize}
    if method != "linear":
        fields["scale"] = _setting(marked, [("parameters",)], "lambda", 1.0)
    if method == "ties":
        densities = [_setting(marked, [scope, ("parameters",)], "density", 1.0) for scope in scopes]
        alike = all(d == densities[0] for d in densities)
        fields |= {"density": densities[0]} if alike else {"densities": densities}
        fields |= {"scope": "tensor", "on_tie": "plus"}
    return fields


def _setting(marked: Marked, scopes: Sequence[Path], name: str, default: float | None) -> Any:
    """One parameter as a schedule: the first scope that speaks for a tensor has it, then the default."""
    rows: list[tuple[str, Any]] = []
    for scope in scopes:
        parameters = _at(marked.value, scope) or {}
        if parameters.get(name) is None:
            continue
        rows += _rows(marked, (*scope, name), parameters[name])
        if rows[-1][0] == "*":
            break
    else:
        if default is None:
            raise LuthierError(f"{name!r} is not given for every tensor", where=marked.where(*scopes[0]))
        rows.append(("*", default))
    globs: dict[str, Any] = {}
    for glob, value in reversed(rows):  # ours: the last match wins; theirs: the first
        for key, part in _by_place(glob, value).items():
            globs.pop(key, None)
            globs[key] = part
    return globs["*"] if len(globs) == 1 else globs


def _rows(marked: Marked, path: Path, value: Any) -> list[tuple[str, Any]]:
    """(glob, number or gradient), first match first, up to one that takes every tensor."""
    if not isinstance(value, (list, dict)) or (isinstance(value, list) and not any(isinstance(v, dict) for v in value)):
        return [("*", _numbers(marked, path, value))]
    rows = []
    for i, entry in enumerate(value if isinstance(value, list) else [value]):
        here = (*path, i) if isinstance(value, list) else path
        if not isinstance(entry, dict) or not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise LuthierError("expected {filter: PART OF A NAME, value: NUMBER}", where=marked.where(*here))
        part = entry.get("filter")
        every = part is None or part == "*"
        rows.append(("*" if every else f"*{_escaped(str(part))}*", _numbers(marked, (*here, "value"), entry["value"])))
        if every:
            break
    return rows


def _by_place(glob: str, value: Any) -> dict[str, Any]:
    """A gradient holds inside the layers; what lies outside takes its first value, before and after them."""
    if not isinstance(value, list) or "layers." in glob or ".h." in glob:
        return {glob: value}
    return {glob: value[0]} | {inside + glob.removeprefix("*"): value for inside in INSIDE}


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _numbers(marked: Marked, path: Path, value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
        raise LuthierError(f"expected a number or a list of numbers, got {value!r}", where=marked.where(*path))
    return [float(v) for v in value] if isinstance(value, list) else float(value)


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


def _model(marked: Marked, path: Path) -> str:
    name = _at(marked.value, path)
    if not isinstance(name, str):
        raise LuthierError("expected the name of a model", where=marked.where(*path))
    if "+" in name or "@" in name:
        do = "give the adapter's folder as the model" if "+" in name else "give a folder of that revision"
        raise LuthierError(f"{name!r} is more than a name", where=marked.where(*path), do=do)
    return name


def _map(marked: Marked, path: Path, known: Sequence[str], refused: Sequence[str] = ()) -> Mapping[str, Any]:
    """The map at `path`, with no key but the known."""
    value = _at(marked.value, path)
    if not isinstance(value, dict):
        raise LuthierError("expected a map", where=marked.where(*path))
    for key in value:
        if key in refused:
            do = "use mergekit for it" if key in ("slices", "modules") else "drop it"
            raise LuthierError(f"{key!r} is not taken over", where=marked.where(*path, key), do=do)
        if key not in known:
            raise unknown("key", str(key), known, where=marked.where(*path, key))
    return value


def _at(value: Any, path: Path) -> Any:
    for key in path:
        if isinstance(value, Mapping):
            value = value.get(key)
        else:
            value = value[key]
        if value is None:
            return None
    return value
