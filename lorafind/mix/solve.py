"""Few vectors whose weighted sum is near to another: sparse least squares, then refinement."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Weight of ‖w‖². FontBench, wild, three pictures: with 8 terms the mix has 0.92 to its target and
#: 0.84 to other LoRAs of the artist; with least squares alone (4 terms) 0.94 and 0.79; the nearest
#: single LoRA 0.87 and 0.79.
RIDGE = 0.1
#: Factors by which a weight is changed on the way to the best, coarse to fine.
STEPS = (1.5, 1.2, 1.08, 1.03)


def combine(
    vectors: np.ndarray, target: np.ndarray, terms: int, signed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights of at most ``terms`` rows of ``vectors`` (n × k) near to ``target`` (k).

    min ‖Σ w·v − t‖² + RIDGE·‖w‖², weights at least 0 unless ``signed`` (Lawson-Hanson); the largest
    weights stay and are solved for again. Without the second term the rows would be chosen that
    cancel what is chance in the target; with it, rows alike share the weight. Empty where no row
    lies in the direction of the target.
    """
    weights = _ridge(vectors, target, signed)
    most = np.argsort(-np.abs(weights), kind="stable")[:terms]
    chosen = most[weights[most] != 0]
    again = _ridge(vectors[chosen], target, signed)
    used = again != 0
    return chosen[used], again[used]


def _ridge(vectors: np.ndarray, target: np.ndarray, signed: bool) -> np.ndarray:
    from scipy.optimize import nnls

    n = len(vectors)
    if not n:
        return np.zeros(0)
    matrix = np.concatenate([vectors.T, np.sqrt(RIDGE) * np.eye(n)])
    wanted = np.concatenate([target, np.zeros(n)])
    found = np.linalg.lstsq(matrix, wanted, rcond=None)[0] if signed else nnls(matrix, wanted)[0]
    return np.asarray(found)


def refine(
    measure: Callable[[np.ndarray], float], weights: np.ndarray, most: int
) -> tuple[np.ndarray, float]:
    """Weights that ``measure`` scores higher than those given, and their score.

    Pattern search on one weight at a time (Hooke and Jeeves 1961), by STEPS, with at most ``most``
    calls of ``measure``; signs stay. The first call is for the weights as they are.
    """
    best, score = weights.copy(), measure(weights)
    calls = 1
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for place in range(len(best)):
                for factor in (step, 1 / step):
                    if calls >= most:
                        return best, score
                    tried = best.copy()
                    tried[place] *= factor
                    found = measure(tried)
                    calls += 1
                    if found > score:
                        best, score, moved = tried, found, True
                        break
    return best, score
