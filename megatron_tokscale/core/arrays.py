"""Names of the package's array types; the plain name is double precision: `Floats` is float64.

`Floats32` is float32, as measured losses and fits on disk are; `Integers` is int64, `Integers32`
int32, `Mask` bool. `Interval` holds the lower and the upper end of an interval.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
AnyFloats = NDArray[np.float16 | np.float32 | np.float64]
Integers = NDArray[np.int64]
Integers32 = NDArray[np.int32]
Integers16 = NDArray[np.int16]
Integers8 = NDArray[np.int8]
Mask = NDArray[np.bool_]
AnyArray = NDArray[np.generic]
Interval = tuple[float, float]
