from __future__ import annotations

import torch

from uvit.diffusion.reuse import reuse_deep_features

X, TIMES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 500.0])


def linear_network(computed):
    """Deep features that are linear in time, and a prediction of twice as much."""

    def network(x, timesteps, outer, deep=None):
        if deep is None:
            computed.append(timesteps[0].item())
            deep = timesteps[0] * torch.arange(3.0) + 7 * torch.ones(len(x), 5, 3)
        return 2 * deep, deep

    return network


def test_features_linear_in_time_are_reused_exactly():
    computed: list[float] = []
    network = reuse_deep_features(linear_network(computed), outer=1, every=3)
    for t in (1000.0, 900.0, 850.0, 600.0, 500.0, 300.0, 10.0):
        expected = 2 * (t * torch.arange(3.0) + 7)
        torch.testing.assert_close(network(X, torch.full((2,), t))[0, 0], expected, rtol=1e-4, atol=1e-3)
    assert computed == [1000, 900, 500]  # the first two, then every third


def test_the_condition_reaches_every_call():
    seen = []

    def network(x, timesteps, outer, deep=None, **condition):
        seen.append((deep is None, condition))
        return x, x

    call = reuse_deep_features(network, outer=1, every=2)
    for t in (9.0, 8.0, 7.0, 6.0):
        call(X, torch.full((2,), t), y="label")
    assert seen == [(is_computed, {"y": "label"}) for is_computed in (True, True, False, True)]


def test_another_batch_size_starts_again():
    computed: list[float] = []
    network = reuse_deep_features(linear_network(computed), outer=1, every=2)
    for t, size in ((9.0, 2), (8.0, 2), (7.0, 4), (6.0, 4), (5.0, 4), (4.0, 4), (3.0, 1)):
        assert len(network(torch.zeros(size, 1), torch.full((size,), t))) == size
    assert computed == [9, 8, 7, 6, 4, 3]
