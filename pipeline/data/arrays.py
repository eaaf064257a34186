"""The type of NumPy arrays, apart from torch: the workers of the preprocessor start fast and stay small."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
