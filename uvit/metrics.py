"""Distances between sets of images."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features, gathered batch by batch in float64.

    Args:
        num_features: length of a feature vector.
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self._sum = torch.zeros(num_features, dtype=torch.float64)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, features: Tensor) -> Moments:
        """Adds (B, num_features) features of any dtype; returns itself."""
        features = features.detach().to("cpu", torch.float64)
        self.count += len(features)
        self._sum += features.sum(dim=0)
        self._outer += features.T @ features
        return self

    @property
    def mean(self) -> Tensor:
        """(num_features,)."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(num_features, num_features), unbiased."""
        return (self._outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two Gaussians, |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) (arXiv 1706.08500).

    The root's trace is that of the symmetric (Σ_a^½ Σ_b Σ_a^½)^½, whose eigenvalues are real.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)
