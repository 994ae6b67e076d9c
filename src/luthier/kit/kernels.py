"""Loops over stretches on a CPU, compiled by Numba: each does in one pass what torch does in several.

Imported only through `kit.compiled`, since Numba is an extra. Every kernel gives torch's bytes: sums keep their
order, and a product is fused with a sum exactly where torch fuses it (seen on x86-64 with AVX-512; processors without
fused products are untried). Compiled once a machine, then cached.

bits: bfloat16 as uint16.  Arrays are flat and contiguous, of one length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite.ir import Constant, IntType, IRBuilder
from numba import carray, njit, types
from numba.extending import intrinsic


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # nogil: other threads go on
    try:
        return njit(cache=True, **settings)(function)
    except RuntimeError:  # no folder for the cache can be written
        return njit(**settings)(function)


@intrinsic
def _fused(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def made(_context: Any, builder: IRBuilder, _signature: Any, values: Any) -> Any:
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), made


_fma: Any = _fused


@intrinsic
def _product(_: Any, a: Any, b: Any) -> Any:
    """The upper and the lower half of a product of two uint64."""
    halves = types.UniTuple(types.uint64, 2)

    def made(context: Any, builder: IRBuilder, _signature: Any, values: Any) -> Any:
        one, other = (builder.zext(value, IntType(128)) for value in values)
        product = builder.mul(one, other)
        upper = builder.trunc(builder.lshr(product, Constant(IntType(128), 64)), IntType(64))
        return context.make_tuple(builder, halves, (upper, builder.trunc(product, IntType(64))))

    return halves(types.uint64, types.uint64), made


_times: Any = _product


@njit(inline="always")
def _wide(bits):
    """bfloat16's bits as the float32 of the same value."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


_BLOCK = 1024
"""Entries whose changes, of some experts, stay in the first cache."""
_FIRST, _THIRD = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_STEPS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)


@_compiled
def philox(key, upper_key, counter, out):
    """Philox4x64-10 (Salmon et al. 2011) with numpy's counters: four words a step, the first one at counter + 1."""
    for step in range(out.size // 4):
        a, b, c, d = counter + np.uint64(step) + np.uint64(1), np.uint64(0), np.uint64(0), np.uint64(0)
        k, m = key, upper_key
        for _ in range(10):
            upper_a, lower_a = _times(_FIRST, a)
            upper_c, lower_c = _times(_THIRD, c)
            a, b, c, d = upper_c ^ b ^ k, lower_c, upper_a ^ d ^ m, lower_a
            k, m = k + _STEPS[0], m + _STEPS[1]
        out[4 * step], out[4 * step + 1], out[4 * step + 2], out[4 * step + 3] = a, b, c, d


_philox = philox


@_compiled
def below(key, start, upper, lower, out):
    """out: of entries from start on, whether their 16-bit word is below upper; where it equals it, whether that of the
    second stream, whose key is 2**64 larger, is below lower. start: a multiple of 16."""
    words = np.empty((out.size + 15) // 16 * 4, np.uint64)
    _philox(key, np.uint64(0), np.uint64(start // 16), words)
    drawn, again = words.view(np.uint16)[: out.size], np.empty(4, np.uint64)
    for first in range(0, out.size, _BLOCK):
        block, equal = drawn[first : first + _BLOCK], np.uint16(0)
        made = out[first : first + _BLOCK]
        for i in range(block.size):
            made[i] = np.uint8(block[i] < upper)
        for i in range(block.size):
            equal |= np.uint16(block[i] == upper)
        if equal:
            for i in range(block.size):
                if block[i] == upper:
                    at = start + first + i
                    _philox(key, np.uint64(1), np.uint64(at // 16), again)
                    made[i] = np.uint8(again.view(np.uint16)[at % 16] < lower)


@_compiled
def finite(bits):
    """Whether no value is NaN or infinite."""
    largest = np.uint16(0)
    for i in range(bits.size):
        largest = max(largest, np.uint16(bits[i] & np.uint16(0x7FFF)))
    return largest < 0x7F80


@_compiled
def difference(bits, base_bits, out):
    """out = values - base."""
    for i in range(bits.size):
        out[i] = _wide(bits[i]) - _wide(base_bits[i])


@_compiled
def accumulate(bits, weight, total):
    """total += weight * values."""
    for i in range(bits.size):
        total[i] = _fma(_wide(bits[i]), weight, total[i])


@_compiled
def shifted(base_bits, change, scale, out):
    """out = base + scale * change."""
    for i in range(change.size):
        out[i] = _fma(change[i], scale, _wide(base_bits[i]))


@_compiled
def weigh(change, weight, total, first):
    """change = weight * change; total += change."""
    for i in range(change.size):
        value = change[i] * weight
        change[i] = value
        total[i] = value if first else total[i] + value


@_compiled
def thin(values, found):
    """Multiply by booleans, in place."""
    for i in range(values.size):
        values[i] *= np.float32(found[i])


@_compiled
def agree(change, total, minus, weight, merged, counts):
    """merged += the magnitude of changes of the total's sign, counts += weight there; a total of 0 is minus or plus."""
    for i in range(change.size):
        negative = total[i] < 0 or (total[i] == 0 and minus)
        value = -change[i] if negative else change[i]
        agreed = value > 0
        merged[i] += value if agreed else np.float32(0)
        counts[i] += weight if agreed else np.float32(0)


@_compiled
def elected(total, minus, drop_ties, divide, unit, counts, merged):
    """The sign given back to merged magnitudes, which are divided by counts in multiples of unit."""
    for i in range(total.size):
        value = merged[i]
        if divide:
            value /= (counts[i] if counts[i] != 0 else np.float32(1)) * unit
        if drop_ties and total[i] == 0:
            value = np.float32(0)
        merged[i] = -value if total[i] < 0 or (total[i] == 0 and minus) else value


@intrinsic
def _at(_: Any, address: Any) -> Any:
    """An address as a pointer to bytes."""

    def made(_context: Any, builder: IRBuilder, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], IntType(8).as_pointer())

    return types.voidptr(types.int64), made


_place: Any = _at


@_compiled
def masses(bits, base_bits, found, before, after):
    """Add the change's magnitudes to lanes, all of them and those that were found."""
    for start in range(0, bits.size, before.size):
        end = start + before.size
        there, base, stay = bits[start:end], base_bits[start:end], found[start:end]
        for i in range(there.size):
            magnitude = abs(_wide(there[i]) - _wide(base[i]))
            before[i] += magnitude
            after[i] += magnitude * np.float32(stay[i])


_shifted, _thin, _weigh, _agree, _elected = shifted, thin, weigh, agree, elected


@_compiled
def _within(bits, base_bits, low, high, out):
    """out = values - base where that has a magnitude from low to high, else 0."""
    for i in range(bits.size):
        value = _wide(bits[i]) - _wide(base_bits[i])
        magnitude = abs(value)
        out[i] = value * np.float32((magnitude >= low) & (magnitude <= high))


@njit(inline="always")
def _sifted(base, experts, found, low, high, number, start, end, out):
    """Of one expert the changes from start to end; 0 where the magnitude is not within bounds, or it was not found."""
    bits = carray(_place(experts[number]), base.shape, np.uint16)[start:end]
    _within(bits, base[start:end], low[number], high[number], out)
    if found[number] != 0:
        _thin(out[: end - start], carray(_place(found[number]), base.shape, np.uint8)[start:end])


@njit(inline="always")
def _weighed(base, experts, found, low, high, factors, start, end, changes, total):
    """The block's changes times their factors, and their sum."""
    for number in range(experts.size):
        _sifted(base, experts, found, low, high, number, start, end, changes[number])
        _weigh(changes[number][: end - start], factors[number], total, number == 0)


@_compiled
def magnitudes(base, experts, out):
    """out[number] = of each entry of an expert's change its magnitude."""
    for number in range(experts.size):
        bits = carray(_place(experts[number]), base.shape, np.uint16)
        for i in range(base.size):
            out[number, i] = abs(_wide(bits[i]) - _wide(base[i]))


@_compiled
def votes(base, experts, found, low, high, factors):
    """How many weighted sums are above 0, less those below."""
    changes, total = np.empty((experts.size, _BLOCK), np.float32), np.empty(_BLOCK, np.float32)
    result = 0
    for start in range(0, base.size, _BLOCK):
        count = min(_BLOCK, base.size - start)
        _weighed(base, experts, found, low, high, factors, start, start + count, changes, total)
        for i in range(count):
            result += np.int64(total[i] > 0) - np.int64(total[i] < 0)
    return result


@_compiled
def voted(base, experts, found, low, high, factors, weights, minus, drop_ties, divide, unit, scale, out):
    """out = base + scale * the changes that agree with the sign of their weighted sum, as `agree` and `elected` say."""
    changes, total = np.empty((experts.size, _BLOCK), np.float32), np.empty(_BLOCK, np.float32)
    merged, counts = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, base.size, _BLOCK):
        count = min(_BLOCK, base.size - start)
        _weighed(base, experts, found, low, high, factors, start, start + count, changes, total)
        for i in range(count):
            merged[i] = counts[i] = np.float32(0)
        for number in range(experts.size):
            _agree(changes[number][:count], total, minus, weights[number], merged, counts)
        _elected(total[:count], minus, drop_ties, divide, unit, counts, merged)
        _shifted(base[start : start + count], merged[:count], scale, out[start : start + count])


@_compiled
def added(base, experts, found, low, high, factors, divisor, scale, out):
    """out = base + scale * the sum of the changes times their factors, over the divisor."""
    change, total = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for start in range(0, base.size, _BLOCK):
        count = min(_BLOCK, base.size - start)
        for i in range(count):
            total[i] = np.float32(0)
        for number in range(experts.size):
            factor = factors[number]
            _sifted(base, experts, found, low, high, number, start, start + count, change)
            for i in range(count):
                total[i] = _fma(change[i], factor, total[i])
        for i in range(count):
            total[i] /= divisor
        _shifted(base[start : start + count], total[:count], scale, out[start : start + count])
