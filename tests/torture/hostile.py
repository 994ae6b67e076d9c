"""Hostile inputs by name: how each is made, which command it is given to, what the error must say.

The tables are in `hostile_*.py`; here is what they share. A case that may rightly be accepted says nothing in
`says`: the command then has to end well, within the same bounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Command = list[str] | Callable[[], Any]
CONFIG = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 2, "vocab_size": 3, "intermediate_size": 2,
    "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip
EMBED, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"
MERGE = "luthier: 1\nsteps:\n  m: {use: merge.linear, experts: [./good, ./bad]}\n"


class Case(NamedTuple):
    """make: writes the input into the folder it is given and tells the command, or what to call in Python.
    says: words of the error, none if the input is rightly accepted.  memory: MiB it may take, cpu: seconds.  full: at
    full length only."""

    name: str
    make: Callable[[Path], Command]
    says: tuple[str, ...]
    memory: int = 700
    cpu: int = 10
    full: bool = False

    @property
    def place(self) -> str:
        return re.sub(r"\W+", "-", self.name)


CASES: dict[str, Case] = {}
LONG = {
    "header: 90 MB of names", "header: half a million names, the last one twice", "recipe: a line of 1500 steps",
    "recipe: a lattice of 60 steps",
    "recipe: a ring of 1500 steps", "recipe: 19,000 keys", "recipe: 10,000 lists deep", "set: a bomb",
    "recipe: a megabyte of one name", "recipe: a megabyte of one word", "certificate: a point of enormous numbers",
    "data: a text of a megabyte", "polynomial: 12,000 brackets", "polynomial: billions of terms",
    "polynomial: a bracket to the 200", "config: a family that is no decoder",
}  # fmt: skip
"""Half a second and more: at full length only."""


def case(name: str, make: Callable[[Path], Command], *says: str, **bounds: Any) -> None:
    """Put a case into the table."""
    assert name not in CASES, name
    CASES[name] = Case(name, make, says, full=name in LONG, **bounds)


def entry(shape: Any, span: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


def good() -> dict[str, Any]:
    return {EMBED: entry([3, 2], [0, 24]), NORM: entry([2], [24, 32])}


def safetensors(path: Path, header: Any, data: bytes | int = 32, length: int | None = None) -> None:
    """A safetensors file of this header, whatever it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    held = bytes(data) if isinstance(data, int) else data
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + held)


def folder(here: Path, name: str, header: Any = None, config: Any = None, **file: Any) -> Path:
    """A checkpoint folder; the good header unless another is given, no file for `False`."""
    made = here / name
    made.mkdir()
    text = config if isinstance(config, (str, bytes)) else json.dumps(config or CONFIG)
    (made / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if header is not False:
        safetensors(made / "model.safetensors", good() if header is None else header, **file)
    return made


def merged(header: Any = None, **rest: Any) -> Callable[[Path], Command]:
    """A merge of a good checkpoint and one with this header."""

    def make(here: Path) -> Command:
        folder(here, "good")
        folder(here, "bad", header, **rest)
        return merge(here)

    return make


def merge(here: Path, recipe: str = MERGE) -> Command:
    (here / "m.yaml").write_text(recipe)
    return ["merge", "m.yaml", "out"]


def real(here: Path, name: str = "bad") -> Path:
    """A copy of a whole tiny model with its tokenizer."""
    return Path(shutil.copytree(os.environ["HOSTILE_MODEL"], here / name))


def recipe(text: str | bytes, verb: str = "plan", file: str = "r.yaml") -> Callable[[Path], Command]:
    """A recipe file given to a command."""

    def make(here: Path) -> Command:
        (here / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        return [verb, file]

    return make


import hostile_adapters  # noqa: E402, F401
import hostile_gguf  # noqa: E402, F401
import hostile_models  # noqa: E402, F401
import hostile_polynomials  # noqa: E402, F401
import hostile_recipes  # noqa: E402, F401
import hostile_runs  # noqa: E402, F401
import hostile_weights  # noqa: E402, F401
