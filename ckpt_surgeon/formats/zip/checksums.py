"""CRC-32 of two runs of bytes, one after the other: what one of the three says of the other two.

A CRC is the rest of a division of polynomials over GF(2): bytes behind others multiply these by a power of x, which
depends on their number alone.  The method is that of zlib's ``crc32_combine``, which Python does not offer.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, its bits reversed
_ONE = 1 << 31


def _product(a: int, b: int) -> int:
    """The product of two polynomials, modulo that of CRC-32."""
    made = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            made ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return made


@lru_cache(1 << 12)
def _power(count: int) -> int:
    """x to the number of bits in ``count`` bytes."""
    made, base = _ONE, _ONE >> 8
    while count:
        if count & 1:
            made = _product(base, made)
        base = _product(base, base)
        count >>= 1
    return made


def joined(first: int, second: int, length: int) -> int:
    """The CRC-32 of bytes with the CRC ``first`` before ``length`` bytes with the CRC ``second``.

    >>> from zlib import crc32
    >>> joined(crc32(b"12345"), crc32(b"6789"), 4) == crc32(b"123456789")
    True
    """
    return _product(_power(length), first) ^ second


def behind(whole: int, first: int, length: int) -> int:
    """The CRC-32 of the last ``length`` bytes of some with the CRC ``whole``, those before them having ``first``.

    >>> from zlib import crc32
    >>> behind(crc32(b"123456789"), crc32(b"12345"), 4) == crc32(b"6789")
    True
    """
    return joined(first, whole, length)
