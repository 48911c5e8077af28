from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from uvit.metrics import Moments, frechet_distance


def test_moments_equal_numpy_however_they_are_batched():
    features = torch.randn(50, 6, dtype=torch.float64) * 3 + 100
    moments = Moments(6)
    for part in features.split([1, 20, 29]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-10)


def test_frechet_distance_of_commuting_gaussians():
    """For diagonal covariances it is |μ_a - μ_b|² + Σ (σ_a - σ_b)²."""
    base = torch.randn(5000, 3, dtype=torch.float64)
    base = (base - base.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(base.T))).T  # exactly N(0, 1)
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 3.0, 0.1])
    distance = frechet_distance(Moments(3).update(base), Moments(3).update(base * scale + shift))
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert distance == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_equals_the_formula_with_scipys_root():
    a, b = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64) * 2 + 1
    one, two = Moments(5).update(a), Moments(5).update(b)
    cross = np.trace(sqrtm(one.covariance.numpy() @ two.covariance.numpy()).real)
    expected = (one.mean - two.mean).square().sum() + one.covariance.trace() + two.covariance.trace() - 2 * cross
    assert frechet_distance(one, two) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one), rel=1e-9)


def test_frechet_distance_to_itself_is_zero_even_where_pixels_are_constant():
    features = torch.randn(30, 4, dtype=torch.float64)
    features[:, 2] = -1
    moments = Moments(4).update(features)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)
