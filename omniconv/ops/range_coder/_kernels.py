"""The reference, compiled."""

from typing import Any

import numba

from omniconv.ops.range_coder import reference

encode: Any = numba.njit(nogil=True, cache=True)(reference.encode)
decode: Any = numba.njit(nogil=True, cache=True)(reference.decode)
