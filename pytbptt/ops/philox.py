"""Counter-based random numbers: an element's bits depend on seed and position only, not on the implementation.

Philox-4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words of random bits for every counter.

    Args:
        counter: four int64 tensors that broadcast together, each holding an unsigned 32-bit word.
        key: two int64 tensors, likewise.

    Returns:
        Four int64 tensors of the broadcast shape, each holding an unsigned 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64; masking after the shift makes them the unsigned high and low words.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> int:
    """Elements whose 16 random bits are at least this are kept; the kept fraction is 1 - threshold / 65536.

    At most 65535: a probability so close to 1 that it rounds to dropping everything would leave nothing to scale up.
    """
    return min(round(65536 * dropout_p), 65535)
