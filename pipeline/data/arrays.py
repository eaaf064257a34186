"""The type of NumPy arrays; it does not import torch, so preprocessing workers start fast and stay small."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
