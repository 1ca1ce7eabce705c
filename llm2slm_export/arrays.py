"""The type of a NumPy array of any dtype."""

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
