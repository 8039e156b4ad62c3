"""How far a mean over images can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor


def bootstrap_interval(values: Tensor | np.ndarray, statistic: Callable[[np.ndarray], float] = np.nanmean,
                       n: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic: images are drawn anew with replacement, n times.

    It covers the choice of test images, not of training seeds. For a paired comparison pass the differences per image.

    Args:
        values: `[N]`, one value per image, or `[N, ...]`: the first axis is drawn, so that the concepts of one image,
            which are not independent, stay together. NaN marks undefined values.
        statistic: takes an array like `values`, gives a number. The default, the mean without NaN, is vectorised.
        n: number of draws.
        level: probability that the interval covers, in (0, 1).
        seed: the same seed gives the same interval.

    Returns:
        (low, high); both NaN where no draw had a defined value.

    Raises:
        ValueError: no images, n < 1, a level outside (0, 1).

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.

    Example:
        >>> bootstrap_interval(np.ones(10))
        (1.0, 1.0)
    """
    values = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values have shape {values.shape}; expected [N] or [N, ...] with at least one image.")
    if n < 1 or not 0 < level < 1:
        raise ValueError(f"n = {n}, level = {level}; expected n >= 1 and 0 < level < 1.")
    if statistic is np.nanmean:
        draws = np.concatenate(list(_means(values, n, seed)))
    else:
        draws = np.array([float(statistic(values[index])) for rows in _draws(len(values), n, seed) for index in rows])
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means(values: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """The mean without NaN of each draw, from sums and counts per image."""
    rows = values.reshape(len(values), -1)
    sums, counts = np.nansum(rows, axis=1), (~np.isnan(rows)).sum(axis=1)
    for index in _draws(len(values), n, seed):
        with np.errstate(invalid="ignore"):  # a draw of undefined values only: 0 / 0 is NaN
            yield sums[index].sum(axis=1) / counts[index].sum(axis=1)


def _draws(size: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of images, `[rows, size]` at a time, n rows in all; in portions, so that 50,000 images fit in memory."""
    rng = np.random.default_rng(seed)
    portion = max(1, 2_000_000 // size)
    for first in range(0, n, portion):
        yield rng.integers(size, size=(min(portion, n - first), size))
