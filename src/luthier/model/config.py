"""The decoder's configuration: sizes, and which Part fills which slot.

    LuthierConfig(hidden_size=256, num_hidden_layers=6, slots={
        "ffn": {"use": "block.moe", "set": {"experts": 8}},     # every layer
        "ffn@0": "block.dense",                                  # but the first
        "mixer@-2--1": {"use": "block.attention", "set": {"kv_heads": 1}},  # and the last two
    })

A key is a slot, or slot@layer, or slot@first-last (both included); layers count from 0, or from the
end if negative; among the keys that fit a layer the one that names the fewest layers wins (the order
of a map does not survive transformers' JSON). The norm before the head belongs to no layer. What is
not named is `block.attention`, `block.dense`, `norm.rms`, the pre-norm layer and the plain stack. Slots
are kept with every field of their Part spelt out, so a saved model does not change when a default does.
"""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from luthier.errors import LuthierError, unknown
from luthier.fields import coerce, thaw
from luthier.shapes import Part

SLOTS = ("mixer", "ffn", "norm", "linear", "head", "layer", "stack")
DEFAULTS = {"mixer": "block.attention", "ffn": "block.dense", "norm": "norm.rms"}
OF_LAYERS = ("mixer", "ffn", "norm", "linear", "layer")
KEY = re.compile(r"(?P<slot>\w+)(?:@(?P<first>-?\d{1,9})(?:-(?P<last>-?\d{1,9}))?)?")
MOST = {
    "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "head_dim": 1 << 16,
    "num_hidden_layers": 4096, "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16,
}  # fmt: skip
"""beyond these a size is a slip of the pen, or would keep the machine busy before anything is checked"""


@strict
class LuthierConfig(PreTrainedConfig):
    """Sizes as in Llama's configuration, and `slots`."""

    model_type = "luthier"
    keys_to_ignore_at_inference = ["past_key_values", "aux"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    """null: as many as query heads"""
    head_dim: int | None = None
    """null: hidden_size / num_attention_heads"""
    intermediate_size: int = 1408
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    """what a mask predictor is given for a token it shall find"""
    slots: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.rope_theta = float(self.rope_theta)
        for name, most in MOST.items():
            size = getattr(self, name)
            if size is not None and not 1 <= size <= most:
                raise LuthierError(f"{name} {size} is not from 1 to {most}", where=name)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise LuthierError(
                    f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads",
                    where="num_attention_heads", do="change one of them or give head_dim",
                )  # fmt: skip
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise LuthierError(f"head_dim {self.head_dim} is odd", where="head_dim", do="rotary positions need pairs")
        self.slots = {key: self._filled(key, value) for key, value in (self.slots or {}).items()}
        for slot in OF_LAYERS:
            for layer in range(self.num_hidden_layers):
                self._named(slot, layer)
        super().__post_init__(**kwargs)

    def _filled(self, key: str, value: Any) -> dict[str, Any]:
        """The slot's Part as {use, set} with every field, after checking that it fits there."""
        place = KEY.fullmatch(key)
        if not place or place["slot"] not in SLOTS:
            raise unknown("slot", key.split("@")[0], SLOTS, where="slots")
        if place["first"] and place["slot"] not in OF_LAYERS:
            raise LuthierError(f"the {place['slot']} belongs to no layer", where=f"slots.{key}", do="drop the @")
        for layer in filter(None, (place["first"], place["last"])):
            if not -self.num_hidden_layers <= int(layer) < self.num_hidden_layers:
                raise LuthierError(f"there is no layer {layer} of {self.num_hidden_layers}", where=f"slots.{key}")
        try:
            part = Part.from_value(value)
        except LuthierError as fault:
            raise fault.at(f"slots.{key}") from None
        if place["slot"] not in part.slots:
            raise LuthierError(f"{part.id} fills {' or '.join(part.slots)}", where=f"slots.{key}")
        return part.to_dict()

    def part(self, slot: str, layer: int | None = None) -> Part | None:
        """The Part that fills `slot` in `layer` (None: outside the layers), None where ours is built in."""
        found = self._named(slot, layer) or DEFAULTS.get(slot)
        return None if found is None else Part.from_value(found)

    def _named(self, slot: str, layer: int | None) -> dict[str, Any] | None:
        """What the slots say of this place: the entry with the narrowest reach."""
        fits = []
        for key, value in (self.slots or {}).items():
            reach = self._reach(key, slot)
            if reach is not None and (layer in reach or key == slot):
                fits.append((len(reach), key, value))
        fits.sort(key=lambda fit: fit[:2])
        if len(fits) > 1 and fits[0][0] == fits[1][0]:
            raise LuthierError(
                f"{fits[0][1]!r} and {fits[1][1]!r} both name layer {layer}", where="slots", do="let one reach further"
            )
        return fits[0][2] if fits else None

    def _reach(self, key: str, slot: str) -> range | None:
        """The layers that a key of `slots` names; None if it is of another slot."""
        place = KEY.fullmatch(key)
        if not place or place["slot"] != slot:
            return None
        if place["first"] is None:
            return range(self.num_hidden_layers + 1)  # wider than any range of layers
        first = int(place["first"]) % self.num_hidden_layers
        last = first if place["last"] is None else int(place["last"]) % self.num_hidden_layers
        return range(first, last + 1)


OWN: dict[str, Any] = dict(LuthierConfig.__annotations__)
"""The fields that are ours, with their types (so annotations of this file must not be postponed)."""


def config_from(values: Mapping[str, Any]) -> LuthierConfig:
    """A configuration from a plain map, such as a recipe's `model: {new: ...}`.

    Raises LuthierError for a name that is no field, with the nearest, and for a value of another type.
    """
    checked = {}
    for name, value in values.items():
        if name not in OWN:
            raise unknown("model field", name, OWN, where="model")
        try:
            checked[name] = thaw(coerce(value, OWN[name]))
        except LuthierError as fault:
            raise fault.at(f"model.{name}") from None
    try:
        return LuthierConfig(**checked)
    except LuthierError as fault:
        raise fault.at("model") from None
