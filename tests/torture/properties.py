"""What the property tests share: how many examples, and drawn tensors with the values that break things."""

import os

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

FULL = os.environ.get("LUTHIER_TORTURE") == "full"


def often(short, full=None):
    """Settings for a property: few and always the same examples in the suite, many new ones at full length."""
    return settings(
        max_examples=(full or 10 * short) if FULL else short, deadline=None, derandomize=not FULL, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 40)
ODD = [0.0, -0.0, 1e-45, 2e-45, 1.1754944e-38, 1e-7, 0.1, 1.0, 1.0000001, 3e38, 3.4028235e38]
"""fp32 that break careless code: zeros, denormals, neighbours, the largest"""


def fp32(n, low=None, signed=True):
    """Flat fp32 tensors of n entries, many of them equal or odd."""
    odd = st.sampled_from([o if not (signed and s) else -o for o in ODD for s in (0, 1)] if signed else ODD)
    plain = st.floats(-1e4 if signed else 0.0, 1e4, width=32)
    return hnp.arrays(np.float32, n, elements=st.one_of(odd, plain, st.integers(0, 3).map(float)), fill=None).map(
        torch.from_numpy)  # fmt: skip


def randn(seed, *shape, dtype=torch.float64):
    """Normal numbers keyed by a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(t):
    """The entries of an fp32 tensor as whole numbers, so that -0 is not 0 and NaN is itself."""
    return t.contiguous().view(-1).view(torch.int32).tolist()
