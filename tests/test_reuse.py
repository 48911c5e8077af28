from __future__ import annotations

import pytest
import torch

from uvit import UViT, UViTConfig
from uvit.common.errors import InputError
from uvit.diffusion.reuse import reuse_deep_features

X, TIMES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 500.0])


@pytest.mark.parametrize("outer", [0, 1, 2])
def test_deep_features_of_the_same_input_give_the_same_output(tiny: UViTConfig, outer):
    model = UViT(tiny).eval()
    prediction, deep = model.forward_reusing(X, TIMES, outer=outer)
    assert torch.equal(prediction, model(X, TIMES))
    assert deep.shape == (2, tiny.num_extra_tokens + 16, tiny.embed_dim)
    ran = []
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
        block.register_forward_hook(lambda *_: ran.append(1))
    again, same = model.forward_reusing(X, TIMES, outer=outer, deep=deep)
    assert torch.equal(again, prediction) and same is deep
    assert len(ran) == 2 * outer  # the outer blocks alone


def test_more_outer_blocks_than_there_are(tiny: UViTConfig):
    with pytest.raises(InputError, match=r"outer blocks must be 0 to depth / 2 = 2, got 3"):
        UViT(tiny).forward_reusing(X, TIMES, outer=3)


def linear_network(computed):
    """Deep features that are linear in time, and a prediction that is nothing else."""

    def network(x, timesteps, outer, deep=None):
        if deep is None:
            computed.append(timesteps[0].item())
            deep = timesteps[0] * torch.arange(3.0) + 7 * torch.ones(len(x), 5, 3)
        return deep, deep

    return network


def test_features_linear_in_time_are_reused_exactly():
    computed: list[float] = []
    network = reuse_deep_features(linear_network(computed), outer=1, every=3)
    for t in (1000.0, 900.0, 850.0, 600.0, 500.0, 300.0, 10.0):
        expected = t * torch.arange(3.0) + 7
        torch.testing.assert_close(network(X, torch.full((2,), t))[0, 0], expected, rtol=1e-4, atol=1e-3)
    assert computed == [1000, 900, 500]  # the first two, then every third


def test_another_batch_size_starts_anew():
    computed: list[float] = []
    network = reuse_deep_features(linear_network(computed), outer=1, every=2)
    for t, size in ((9.0, 2), (8.0, 2), (7.0, 4), (6.0, 4), (5.0, 4), (4.0, 4), (3.0, 2)):
        assert len(network(torch.zeros(size, 1), torch.full((size,), t))) == size
    assert computed == [9, 8, 7, 6, 4, 3]


def test_every_parameter_of_the_outer_blocks_still_gets_a_gradient(tiny: UViTConfig):
    model = UViT(tiny)
    _, deep = model.forward_reusing(X, TIMES, outer=1)
    model.forward_reusing(X, TIMES, outer=1, deep=deep.detach())[0].square().mean().backward()
    outer = [*model.in_blocks[:1].parameters(), *model.out_blocks[-1:].parameters()]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in outer)
    assert all(parameter.grad is None for parameter in model.mid_block.parameters())
