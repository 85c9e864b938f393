"""Statistics over seeds: the mean with its standard error, also of differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Student's t, which 95% of means stay within, by the number of seeds; for more of them it is 2.3 or less."""


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 for a single value, whose spread is not known."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """The mean ± its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{error}"


def difference(mine: Sequence[float], other: Sequence[float], digits: int = 2) -> str:
    """The mean difference ± its standard error, seed by seed."""
    return spread([a - b for a, b in zip(mine, other, strict=True)], digits, "+")


def verdict(differences: Sequence[float]) -> str:
    """Whether the mean is further from 0 than Student's t allows in 95% of cases for so few seeds."""
    if len(differences) < 2:
        return "one seed"
    allowed = STUDENT.get(len(differences), 2.3) * standard_error(differences)
    return "within noise" if abs(statistics.fmean(differences)) <= allowed else "beyond noise"
