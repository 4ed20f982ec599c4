"""Random numbers that are a function of their place: SplitMix64 in standard integer operators.

The generator is that of Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014), as in
Java's SplittableRandom; its output function is Stafford's variant 13 of MurmurHash3's 64-bit finalizer.  Number i of
the stream with key k needs none of those before it:

    word(k, i) = mix(k + (i + 1) GAMMA)                                            modulo 2^64
    mix(z):      z = (z ^ z >> 30) 0xbf58476d1ce4e5b9;  z = (z ^ z >> 27) 0x94d049bb133111eb;  z ^ z >> 31

A key is folded from several numbers, k = 0, then k = mix((k ^ v) + GAMMA) for each v.

All of it is unsigned integer arithmetic, the same bits in every runtime.
"""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_graphsurgeon as gs

from zilc.emit import Emitter

#: The odd integer nearest to 2^64 divided by the golden ratio.
GAMMA = 0x9E3779B97F4A7C15
_STAGES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST = 31
_UINT64 = np.dtype(np.uint64)


def constant_of(name: str) -> int:
    """A 64-bit constant for a name: the first eight bytes of its SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")


def fold(op: Emitter, key: gs.Tensor | None, value: gs.Tensor | int) -> gs.Tensor:
    """The key with one more number in it, uint64 [1].

    Args:
        key: None to begin with.
        value: an int64 [] tensor (negative ones modulo 2^64), or a number.
    """
    number = _number(value) if isinstance(value, int) else op.Reshape(op.cast(value, _UINT64), [1])
    return mix(op, op.Add(number if key is None else op.BitwiseXor(key, number), _number(GAMMA)))


def words(op: Emitter, key: gs.Tensor, count: gs.Tensor) -> gs.Tensor:
    """The first ``count`` (int64 []) numbers of a stream, uint64 [count]."""
    one = np.asarray(1, np.int64)
    known = op.value(count)
    end = op.Add(count, one) if known is None else np.asarray(int(known) + 1, np.int64)
    # (i + 1) GAMMA, the same for all streams of one length
    place = op.Mul(op.cast(op.Range(one, end, one), _UINT64), _number(GAMMA))
    return mix(op, op.Add(place, key))


def mix(op: Emitter, z: gs.Tensor) -> gs.Tensor:
    """The output function, a bijection of uint64."""
    for shift, factor in _STAGES:
        z = op.Mul(op.BitwiseXor(z, _shifted(op, z, shift)), _number(factor))
    return op.BitwiseXor(z, _shifted(op, z, _LAST))


def _shifted(op: Emitter, z: gs.Tensor, by: int) -> gs.Tensor:
    return op.BitShift(z, _number(by), direction="RIGHT")


def _number(value: int) -> np.ndarray:
    # Of one dimension: numpy warns when a scalar wraps around, and not when an array does.
    return np.asarray([value], np.uint64)

