"""Groups among vectors, against planted ones and against scikit-learn's own scores."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from lorafind.groups.cluster import by_density, by_number, outliers


def planted(groups: int, size: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around orthogonal centres, n × 10, and the centre of each."""
    which = np.repeat(np.arange(groups), size)
    vectors = np.eye(10)[which] + noise * np.random.default_rng(5).standard_normal((len(which), 10))
    return vectors, which


def test_k_means_finds_what_is_planted_and_gives_others_the_nearest_mean() -> None:
    vectors, which = planted(4, 6, 0.1)
    found = by_number(vectors, 4)
    assert adjusted_rand_score(which, found.labels) == 1.0
    assert found.centres is not None
    for label in range(4):
        mean = vectors[found.labels == label].mean(0)
        np.testing.assert_allclose(found.centres[label], mean, atol=1e-12)
    fresh = np.eye(10)[[2, 0, 2]] * 3
    assert found.of(fresh).tolist() == found.labels[[12, 0, 12]].tolist()
    assert found.of(np.zeros((0, 10))).tolist() == []


def test_equal_vectors_leave_fewer_groups() -> None:
    assert len(by_number(np.repeat(np.eye(3), 4, 0), 5)) == 3


@pytest.mark.parametrize("number", [0, 13])
def test_groups_that_cannot_be(number: int) -> None:
    with pytest.raises(ValueError, match=f"{number} groups of 12 vectors"):
        by_number(np.repeat(np.eye(3), 4, 0), number)


def test_density_leaves_a_stranger_alone() -> None:
    vectors, which = planted(3, 6, 0.05)
    found = by_density(np.concatenate([vectors, -np.eye(10)[9:]]))
    assert found.labels[-1] == -1
    assert adjusted_rand_score(which, found.labels[:-1]) == 1.0
    near = vectors[:1] + 1e-3
    assert found.of(np.concatenate([near, 9 * np.eye(10)[:1]])).tolist() == [found.labels[0], -1]


def test_reach_is_the_farthest_nearest_neighbour() -> None:
    vectors, _ = planted(2, 5, 0.05)
    found = by_density(vectors)
    for label in range(2):
        own = vectors[found.labels == label]
        apart = np.linalg.norm(own[:, None] - own[None], axis=2)
        np.fill_diagonal(apart, np.inf)
        assert found.reach[label] == pytest.approx(apart.min(1).max(), rel=1e-12)


def test_few_vectors_are_no_group_by_density() -> None:
    assert by_density(np.eye(2)).labels.tolist() == [-1, -1]
    with pytest.raises(ValueError, match="it takes two"):
        by_density(np.eye(4), 1)


def test_outliers_are_low_only() -> None:
    scores = np.array([0.90, 0.91, 0.92, 0.93, 0.94, 0.2, 1.5])
    assert outliers(scores).tolist() == [False] * 5 + [True, False]
    assert outliers(np.zeros(0)).tolist() == []
