"""Numbers spread evenly: 0, 1, 2, ... sent to places that lie far apart."""

import functools
import math


@functools.cache
def golden_stride(size: int) -> int:
    """A step, about the golden section of the size, with which each place in [0, size) is met once.

    Any run of numbers times it, by the size, is spread evenly (Knuth, "The Art of Computer
    Programming" vol. 3, section 6.4, on Fibonacci hashing).
    """
    stride = max(1, round(size * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
