"""A layer's tensors as heads and hidden units, whatever the family calls them and however it fuses them; and back.

`attention_of` and `units_of` need names, roles and shapes only, and refuse by name what they cannot take
apart. Their `read` gives fp64, biases as one more input; `write` gives tensors of the old shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from luthier.checkpoint.anatomy import Family, family, stack_of, text_config
from luthier.errors import LuthierError, said
from luthier.kit.symmetry import Heads, Units

KNOWN = ("block.attention", "block.dense", "block.moe")
"""What may fill the slots of our own decoder that weights are read by."""
SHARES = ("rotary_pct", "partial_rotary_factor")
"""Keys of config.json, some of which some families heed."""
_INTO = ("gate", "up", "gate_up")
"""Parts of a feed-forward block that the stream goes into."""
WITHOUT = "leave its attention out: set: {parts: [mlp]}"


@dataclass(frozen=True)
class AttentionAt:
    """Where the attention of one layer lies. names: part ("q", "q.bias", "qkv", "o", "q_norm") → tensor.

    pairs_F2: the entries of a head that turn together.
    """

    row: Family
    names: Mapping[str, str]
    heads: int
    groups: int
    width: int
    pairs_F2: Tensor

    @property
    def normed(self) -> bool:
        return "q_norm" in self.names

    def read(self, values: Mapping[str, Tensor]) -> Heads:
        """The heads, from tensors by name."""
        g, h = self.groups, self.width
        if "qkv" in self.names:
            rows = self._rows(values, "qkv")
            if self.row.qkv == "by_head":
                q, k, v = rows.view(-1, 3, h, rows.shape[1]).unbind(1)
            else:
                q, k, v = rows.split([self.heads * h, g * h, g * h])
        else:
            q, k, v = (self._rows(values, part) for part in "qkv")
        o_HX = _exact(values, self.names["o"])
        o_HX = o_HX if "attn.o" in self.row.transposed else o_HX.T
        made = Heads(q.reshape(g, -1, h, q.shape[-1]), k.reshape(g, h, -1), v.reshape(g, h, -1),
                     o_HX.reshape(g, -1, h, o_HX.shape[1]))  # fmt: skip
        if not self.normed:
            return made
        q_gain, k_gain = (_exact(values, self.names[part]).reshape(-1, h) for part in ("q_norm", "k_norm"))
        q_gain_GMH = q_gain.view(1, 1, h) if len(q_gain) == 1 else q_gain.view(g, -1, h)
        return replace(made, q_gain_GMH=q_gain_GMH, k_gain_GH=k_gain)

    def write(self, heads: Heads, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The heads as tensors by name, shaped like `values`."""
        made: dict[str, Tensor] = {}
        parts = {"q": heads.q_GMHX, "k": heads.k_GHX, "v": heads.v_GHX}
        rows = {n: t.reshape(self.groups, -1, self.width, t.shape[-1]).flatten(0, 1) for n, t in parts.items()}
        if "qkv" in self.names:
            every = list(rows.values())
            rows = {"qkv": torch.stack(every, 1) if self.row.qkv == "by_head" else torch.cat(every)}
        for part, each in rows.items():
            self._put(made, part, each.reshape(-1, each.shape[-1]))
        o_HX = heads.o_GMHX.reshape(-1, heads.o_GMHX.shape[-1])
        made[self.names["o"]] = o_HX if "attn.o" in self.row.transposed else o_HX.T
        if heads.q_gain_GMH is not None and heads.k_gain_GH is not None:
            made[self.names["q_norm"]], made[self.names["k_norm"]] = heads.q_gain_GMH, heads.k_gain_GH
        return {name: t.reshape(values[name].shape) for name, t in made.items()}

    def _rows(self, values: Mapping[str, Tensor], part: str) -> Tensor:
        return _joined(values, self.names, part, f"attn.{part}" in self.row.transposed)

    def _put(self, made: dict[str, Tensor], part: str, rows: Tensor) -> None:
        _parted(made, self.names, part, rows, f"attn.{part}" in self.row.transposed)


@dataclass(frozen=True)
class UnitsAt:
    """Where one feed-forward block lies. label: its place in the layer, such as mlp.experts.3."""

    label: str
    names: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False

    def read(self, values: Mapping[str, Tensor]) -> Units:
        """The hidden units, from tensors by name."""
        down_UX = _exact(values, self.names["down"])
        rows = {part: _joined(values, self.names, part, self.transposed) for part in _INTO if part in self.names}
        if "gate_up" in rows:
            rows["gate"], rows["up"] = rows["gate_up"].chunk(2)
        return Units(rows.get("gate"), rows["up"], down_UX if self.transposed else down_UX.T)

    def write(self, units: Units, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hidden units as tensors by name, shaped like `values`."""
        made: dict[str, Tensor] = {self.names["down"]: units.down_UX if self.transposed else units.down_UX.T}
        rows = {"up": units.up_UX} if units.gate_UX is None else {"gate": units.gate_UX, "up": units.up_UX}
        if "gate_up" in self.names:
            rows = {"gate_up": torch.cat(list(rows.values()))}
        for part, each in rows.items():
            _parted(made, self.names, part, each, self.transposed)
        return {name: t.reshape(values[name].shape) for name, t in made.items()}


def _exact(values: Mapping[str, Tensor], name: str) -> Tensor:
    return values[name].to(device="cpu", dtype=torch.float64)  # not every accelerator has fp64


def _joined(values: Mapping[str, Tensor], names: Mapping[str, str], part: str, transposed: bool) -> Tensor:
    """A projection's rows, with its bias as one more input."""
    rows = _exact(values, names[part])
    rows = rows.T if transposed else rows
    bias = names.get(f"{part}.bias")
    return rows if bias is None else torch.cat((rows, _exact(values, bias)[:, None]), 1)


def _parted(made: dict[str, Tensor], names: Mapping[str, str], part: str, rows: Tensor, transposed: bool) -> None:
    bias = names.get(f"{part}.bias")
    if bias is not None:
        rows, made[bias] = rows[:, :-1], rows[:, -1]
    made[names[part]] = rows.T if transposed else rows


def attention_of(config: Mapping[str, Any], layer: Mapping[str, Any]) -> AttentionAt:
    """Where the attention of a layer lies, which `layer` names: tensor → what has a role and a shape.

    LuthierError for what is no grouped-query attention of separate or fused projections.
    """
    row, text = family(config["model_type"]), text_config(config)
    found = [(t.role.removeprefix("attn."), name) for name, t in layer.items() if t.role.startswith("attn.")]
    names, where, heads = dict(found), next(iter(layer), None), text.get(row.heads)
    if len(names) < len(found) or not ({"q", "k", "v", "o"} <= set(names) or {"qkv", "o"} <= set(names)):
        raise LuthierError(f"this attention of {row.name} has no heads that can be told apart", where=where, do=WITHOUT)
    if text.get("clip_qkv") is not None:
        raise LuthierError("clipped queries, keys and values (clip_qkv) see their coordinates", where=where, do=WITHOUT)
    if not isinstance(heads, int) or heads < 1:
        raise LuthierError(f"config.json does not say how many heads there are ({row.heads})", where=where)
    _check_slots(config, "mixer")
    shapes = {p: tuple(layer[n].shape)[:: -1 if f"attn.{p}" in row.transposed else 1] for p, n in names.items()}
    flat = next((p for p in ("q", "k", "v", "qkv", "o") if p in shapes and len(shapes[p]) != 2), None)
    if flat:
        raise LuthierError(f"has the shape {list(shapes[flat])}, no matrix", where=names[flat], do=WITHOUT)
    fused = "qkv" in names
    rows = {p: shapes[p][0] for p in (("qkv",) if fused else "qkv")}
    if fused:  # the rows alone do not tell how many are keys
        groups = told if isinstance(told := text.get(row.kv_heads), int) and told > 0 else heads
        width, left = divmod(rows["qkv"], heads + 2 * groups)
    else:
        width, left = divmod(rows["q"], heads)
        groups = rows["k"] // max(width, 1)
    fits = left == 0 and width > 0 and groups > 0 and heads % groups == 0
    if not fits or not (fused or rows["k"] == rows["v"] == groups * width):
        raise LuthierError(f"rows {rows} are no {heads} heads", where=where, do=WITHOUT)
    _check_shapes(names, shapes, heads * width, groups * width, width)
    return AttentionAt(row, names, heads, groups, width, pairs(config, width))


def _check_shapes(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], query: int, key: int, width: int
) -> None:
    """LuthierError for a tensor that does not go with its layer's others. query, key: rows of all heads together."""
    rows = {"q": query, "k": key, "v": key, "qkv": query + 2 * key}
    inputs = shapes["qkv" if "qkv" in shapes else "q"][1]
    whole = shapes.get("q_norm") == (query,)  # gains of all heads, or those that every head has
    allowed = {
        **{part: (n, inputs) for part, n in rows.items()}, **{f"{part}.bias": (n,) for part, n in rows.items()},
        "o": (inputs, query), "o.bias": (inputs,),
        "q_norm": (query if whole else width,), "k_norm": (key if whole else width,),
    }  # fmt: skip
    for part, shape in shapes.items():
        if part not in allowed:
            raise LuthierError("its place in the attention is not known", where=names[part], do=WITHOUT)
        if shape != allowed[part]:
            what = f"has the shape {list(shape)}, its layer's others ask for {list(allowed[part])}"
            raise LuthierError(what, where=names[part], do=WITHOUT)
    if ("q_norm" in shapes) != ("k_norm" in shapes):
        raise LuthierError("queries or keys alone have a norm", where=names["q"], do=WITHOUT)


def turning_share(config: Mapping[str, Any]) -> float:
    """The share of a head's entries that turn with the position, from the first one on.

    LuthierError for what transformers would read otherwise than it looks: a share that the family passes over, two
    that differ.
    """
    text, row = text_config(config), family(config["model_type"])
    if row.rotary == "none":
        return 0.0
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise LuthierError(f"rope_parameters is {said(rope)}, no map", where="config.json", do=WITHOUT)
    told = {"rope": rope.get("partial_rotary_factor"), **{k: text.get(k) for k in SHARES}}
    heeded = [told["rope"], told[row.partial]] if row.partial else []
    share = next((s for s in heeded if s is not None), row.turning)
    for other in told.values():
        if other is not None and (isinstance(other, bool) or not isinstance(other, int | float) or not 0 <= other <= 1):
            raise LuthierError(f"{said(other)} is no share of a head that turns", where="config.json", do=WITHOUT)
        if other is not None and other != share:
            what = f"says that {other:.0%} of a head turn, where {row.name} turns {share:.0%}"
            raise LuthierError(what, where="config.json", do=WITHOUT)
    return float(share)


def pairs(config: Mapping[str, Any], width: int) -> Tensor:
    """The entries of a head of this width that turn together, one pair a row."""
    half = int(width * turning_share(config)) // 2
    first = torch.arange(half)
    interleaved = family(config["model_type"]).rotary == "interleaved"
    return torch.stack((2 * first, 2 * first + 1) if interleaved else (first, first + half), 1)


def units_of(config: Mapping[str, Any], layer: Mapping[str, Any]) -> list[UnitsAt]:
    """Where the feed-forward blocks of a layer lie, those of every expert too. LuthierError for other forms."""
    row = family(config["model_type"])
    found: dict[str, dict[str, str]] = {}
    for name, t in layer.items():
        kind, _, part = t.role.removesuffix(".bias").rpartition(".")
        if kind in ("mlp", "moe", "moe.shared") and part in (*_INTO, "down"):
            inside = name.removeprefix(f"{stack_of(name)}.").split(".")[1:]  # after the layer's number
            label = ".".join(inside[: -2 if inside[-1] in ("weight", "bias") else -1])
            found.setdefault(label, {})[part + (".bias" if t.role.endswith(".bias") else "")] = name
    for label, names in found.items():
        flat = [n for p, n in names.items() if not p.endswith(".bias") and len(layer[n].shape) != 2]
        if flat or not ({"up", "down"} <= set(names) or {"gate_up", "down"} == {p.partition(".")[0] for p in names}):
            raise LuthierError(f"{label}: no feed-forward block of gate, up and down", where=next(iter(names.values())),
                               do="leave it out of `parts`")  # fmt: skip
        _check_block(names, {p: tuple(layer[n].shape) for p, n in names.items()}, "mlp.up" in row.transposed)
    _check_slots(config, "ffn")
    return [UnitsAt(label, names, "mlp.up" in row.transposed) for label, names in found.items()]


def _check_block(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], transposed: bool) -> None:
    """LuthierError for a tensor that does not go with the others of its feed-forward block."""
    units, inputs = shapes["up" if "up" in shapes else "gate_up"][:: -1 if transposed else 1]
    units = units if "up" in shapes else units // 2
    outputs = shapes["down"][1 if transposed else 0]
    for part, shape in shapes.items():
        weight, _, bias = part.partition(".")
        rows, columns = (outputs, units) if weight == "down" else (units * (1 + (weight == "gate_up")), inputs)
        allowed = (rows,) if bias else (columns, rows) if transposed else (rows, columns)
        if shape != allowed:
            what = f"has the shape {list(shape)}, its block's others ask for {list(allowed)}"
            raise LuthierError(what, where=names[part], do="leave it out of `parts`")


def _check_slots(config: Mapping[str, Any], slot: str) -> None:
    """What fills a slot of our own decoder may compute otherwise than what is known here."""
    for key, value in (config.get("slots") or {}).items() if config["model_type"] == "luthier" else ():
        use = value["use"] if isinstance(value, Mapping) else str(value)
        if key.split("@")[0] in (slot, "linear", "layer") and use not in KNOWN:
            raise LuthierError(f"what {use} computes may see other coordinates", where=f"config.json: slots.{key}",
                               do="leave it out of `parts`")  # fmt: skip
