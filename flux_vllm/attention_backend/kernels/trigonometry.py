"""Cosine and sine of large angles in a few instructions.

CUDA's own have a slow path for large angles that takes most of a kernel's registers even where it
is never taken. Rotary angles reach position * 1.0, up to about 1e6.
"""

import triton
import triton.language as tl

_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi / 2 = _HIGH + _LOW, both exact in float32.
_HIGH = tl.constexpr(1.5707963705062866)
_LOW = tl.constexpr(-4.371139000186241e-08)


@triton.jit
def cos_sin(angle):
    """Return cosine and sine of float32 angles from 0 to 1e6; each within 3e-7 on a GPU.

    The multiple of pi / 2 is taken away by fused multiply-adds: their rounding is that of the
    small rest. The polynomials are those of the Cephes library.
    """
    turns = tl.floor(angle * _TWO_OVER_PI + 0.5)
    rest = tl.math.fma(turns, -_HIGH, angle)
    rest = tl.math.fma(turns, -_LOW, rest)
    square = rest * rest
    sine = -1.9515295891e-4 * square + 8.3321608736e-3
    sine = (sine * square - 1.6666654611e-1) * square * rest + rest
    cosine = 2.443315711809948e-5 * square - 1.388731625493765e-3
    cosine = (cosine * square + 4.166664568298827e-2) * square * square - 0.5 * square + 1.0
    quadrant = turns.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin
