"""The concrete `Ctx`: keyed randomness, progress events, a cache for the run."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from luthier.kit.telling import Telling, Watch

_PLAIN = {str, int}


@lru_cache(4096)
def _key(*parts: Any) -> int:
    text = json.dumps(parts, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _digest(name: str, key: Mapping[str, Any]) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]}"


@dataclass(frozen=True)
class Context(Telling):
    """See `luthier.flows.Ctx`. watch receives each event as a dict with at least `kind` and `step`.

    cache: a folder for `cached`; None keeps nothing between steps.  scratch: a folder that lasts as long as
    the survey and the stream of one Transform.
    """

    seed: int = 0
    step: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    survey: Any = None
    roles: Mapping[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    scratch: Path | None = None
    watch: Watch | None = None

    def key(self, *item: Any) -> int:
        if {*map(type, item)} <= _PLAIN:  # of others equal ones may be written differently
            return _key(self.seed, self.step, *item)
        return _key.__wrapped__(self.seed, self.step, *item)

    def rng(self, *item: Any, device: Any = "cpu") -> torch.Generator:
        return torch.Generator(device=device).manual_seed(self.key(*item))

    def role(self, name: str, default: Any = None) -> Any:
        return self.roles.get(name, default)

    def cached(
        self, name: str, key: Mapping[str, Any], make: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        if self.cache is None:
            return make()
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        path = self.cache / f"{_digest(name, key)}.safetensors"
        if path.exists():
            return load_file(path)
        made = make()
        part = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in made.items()}, part)
            part.rename(path)
        except (OSError, SafetensorError):  # a full or read-only disk only costs the next step its time
            with suppress(OSError):
                part.unlink()
        return made

    def fitted(self, name: str, key: Mapping[str, Any], training: Any) -> dict[str, torch.Tensor]:
        saves = None if self.cache is None else self.cache / f"{_digest(name, key)}.training"

        def make() -> dict[str, torch.Tensor]:
            drawn = importlib.import_module("luthier.engine.drawn")  # layers above the kit
            return drawn.fitted(training, key, self, saves)

        made = self.cached(name, key, make)
        if saves is not None and saves.with_suffix(".safetensors").exists():
            shutil.rmtree(saves, ignore_errors=True)
        return made

    def with_(self, **changes: Any) -> Context:
        """A copy with some attributes changed."""
        return replace(self, **changes)
