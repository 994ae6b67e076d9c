"""A secret from a key file, and the numbers drawn from it: the same on every machine and in every version.

Numbers come from SHAKE-256 over the key and a label, so a draw depends on nothing that was drawn before.
A Secret is never shown: what prints, or is written down, is its fingerprint.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.errors import LuthierError

LEAST, MOST = 16, 1 << 20
"""bytes of a key file: fewer can be guessed, more is another file"""


class Secret:
    """The bytes of a key."""

    __slots__ = ("_key", "fingerprint")

    def __init__(self, content: bytes):
        self._key = hashlib.blake2b(content, person=b"luthier key").digest()
        self.fingerprint: str = hashlib.blake2b(self._key, digest_size=8, person=b"luthier finger").hexdigest()

    @classmethod
    def read(cls, path: str | Path) -> Secret:
        """The secret in a file; LuthierError, one line, where it cannot be one."""
        file = Path(path).expanduser()
        if not file.is_file():
            raise LuthierError(
                "there is no such key file", where=str(path), do=f"make one: openssl rand -out {path} 32"
            )
        size = file.stat().st_size
        if not LEAST <= size <= MOST:
            raise LuthierError(f"a key of {size:,} bytes", where=str(path), do=f"use {LEAST} random bytes or more")
        return cls(file.read_bytes())

    def __repr__(self) -> str:
        return f"Secret({self.fingerprint})"

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not written down")

    def _words(self, label: str, count: int) -> Tensor:
        """`count` integers from 0 up to 2^62."""
        raw = bytearray(hashlib.shake_256(self._key + label.encode()).digest(8 * count))
        return torch.frombuffer(raw, dtype=torch.int64) & ((1 << 62) - 1) if count else torch.empty(0).long()

    def uniform(self, label: str, *shape: int) -> Tensor:
        """Numbers above 0 and up to 1, fp64."""
        return ((self._words(label, math.prod(shape)) + 1).double() / 2.0**62).view(shape)

    def normal(self, label: str, *shape: int) -> Tensor:
        """Standard normal numbers, fp64."""
        first, second = self.uniform(label, 2, *shape)
        return (-2 * first.log()).sqrt() * (2 * math.pi * second).cos()

    def order(self, label: str, count: int) -> Tensor:
        """An order of `count` things."""
        return self._words(label, count).argsort()

    def spread(self, label: str, ratio: float, *shape: int) -> Tensor:
        """Factors around 1, equally likely at every scale; the largest is at most `ratio` times the least."""
        return torch.exp((self.uniform(label, *shape) - 0.5) * math.log(ratio))

    def rotation(self, label: str, *shape: int) -> Tensor:
        """Orthogonal matrices, equally likely in every direction: the last two sizes are equal."""
        q, r = torch.linalg.qr(self.normal(label, *shape))
        return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
