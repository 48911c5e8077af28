"""The parts of the U-Net against PyTorch's, diffusers' and formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import Transformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange, reduce
from helpers.golden import rnd, with_golden_weights

from uvit import UNetConfig
from uvit.networks.unet_layers import (
    GEGLU,
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Stage,
    Upsample,
    average_pixels,
    repeat_pixels,
)

CHANNELS = 64
CONFIG = {"img_size": 8, "model_channels": CHANNELS, "channel_mult": (1,), "attention_sizes": (8,), "head_dim": 16}
X, EMBEDDING = rnd("x", (2, CHANNELS, 6, 8)), rnd("embedding", (2, 4 * CHANNELS))
TIGHT = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize(
    ("channels", "resample", "change"),
    [(64, None, {}), (96, None, {}), (64, average_pixels, {"down": True}), (64, repeat_pixels, {"up": True})],
)
@pytest.mark.parametrize(("adaptive", "kind"), [(True, "scale_shift"), (False, "default")])
def test_a_residual_block_equals_that_of_diffusers(channels, resample, change, adaptive, kind):
    ours = with_golden_weights(ResBlock(UNetConfig(**CONFIG, scale_shift_norm=adaptive), CHANNELS, channels, resample))
    theirs = ResnetBlock2D(
        in_channels=CHANNELS,
        out_channels=channels,
        temb_channels=4 * CHANNELS,
        eps=1e-5,
        time_embedding_norm=kind,
        **change,
    )
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    torch.testing.assert_close(ours(X, EMBEDDING), theirs(X, EMBEDDING), **TIGHT)


def test_adaptive_norms_take_the_scale_first_and_add_one_to_it():
    ours = with_golden_weights(ResBlock(UNetConfig(**CONFIG), CHANNELS, CHANNELS))
    embedded = ours.emb_layers(EMBEDDING)[:, :, None, None]
    scale, shift = embedded[:, :CHANNELS], embedded[:, CHANNELS:]
    h = torch.nn.functional.group_norm(ours.in_layers(X), 32, ours.out_layers[0].weight, ours.out_layers[0].bias)
    h = h + h * scale + shift
    torch.testing.assert_close(ours(X, EMBEDDING), X + ours.out_layers[3](h * h.sigmoid()), **TIGHT)


def test_resampling_comes_after_the_first_norm_and_before_the_first_convolution():
    ours = ResBlock(UNetConfig(**CONFIG), CHANNELS, CHANNELS, average_pixels)
    norm, silu, conv = ours.in_layers
    seen = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    ours(X, EMBEDDING)
    assert torch.equal(seen[0], average_pixels(silu(norm(X))))
    assert not torch.allclose(seen[0], silu(norm(average_pixels(X))), atol=1e-2)


def test_pixels_are_repeated_and_averaged():
    assert torch.equal(repeat_pixels(X), X.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(average_pixels(X), reduce(X, "B C (H h) (W w) -> B C H W", "mean", h=2, w=2))


@pytest.mark.parametrize(("layer", "shape"), [(Downsample, (3, 4)), (Upsample, (12, 16))])
def test_changes_of_resolution_by_a_convolution(layer, shape):
    ours = with_golden_weights(layer(CHANNELS))
    conv = next(module for module in ours.modules() if isinstance(module, torch.nn.Conv2d))
    wide = X if layer is Downsample else X.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    patches = torch.nn.functional.unfold(wide, 3, padding=1, stride=2 if layer is Downsample else 1)
    expected = conv.weight.flatten(1) @ patches + conv.bias[:, None]
    torch.testing.assert_close(ours(X), expected.unflatten(2, shape), **TIGHT)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_group_norm_is_exact_where_naive_half_precision_is_not(eps):
    norm = with_golden_weights(GroupNorm(CHANNELS, eps))
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]

    def by_hand(x):
        groups = rearrange(x, "B (G C) H W -> B G (C H W)", G=32)
        centred = groups - groups.mean(dim=-1, keepdim=True)
        normed = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return normed.view_as(x) * weight.to(x.dtype) + bias.to(x.dtype)

    x = (X + 30).half()  # squares of small differences from a large mean
    exact = by_hand(x.double())
    torch.testing.assert_close(norm(x.float()).double(), exact, rtol=1e-4, atol=1e-4)
    for module in (norm, GroupNorm(CHANNELS, eps).half()):
        module.load_state_dict(norm.state_dict())
        ours, naive = (each(x).double() - exact for each in (module, by_hand))
        assert module(x).dtype == torch.half
        assert ours.abs().max() < 2e-3 < 5e-3 < naive.abs().max()
    assert torch.equal(norm(x), norm(x.float()).half())


def test_group_norm_takes_a_single_value_in_a_group():
    torch.testing.assert_close(GroupNorm(32)(rnd("x", (1, 32, 1, 1))), torch.zeros(1, 32, 1, 1), rtol=0, atol=1e-4)


def legacy_rows(num_heads):
    """Where the rows of queries, keys and values, one after the other, stand in the legacy order."""
    return rearrange(torch.arange(3 * CHANNELS), "(K H D) -> (H K D)", K=3, H=num_heads)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize(("heads", "num_heads"), [({"head_dim": 16}, 4), ({"head_dim": 0, "num_heads": 2}, 2)])
def test_self_attention_equals_pytorchs_in_either_order_of_channels(heads, num_heads, backend):
    fields = {**CONFIG, **heads, "attention": backend}
    new = with_golden_weights(AttentionBlock(UNetConfig(**fields, qkv_order="new"), CHANNELS))
    legacy = AttentionBlock(UNetConfig(**fields), CHANNELS)
    theirs = torch.nn.MultiheadAttention(CHANNELS, num_heads, batch_first=True)
    weights = [tensor.squeeze(-1) for tensor in (*new.qkv.parameters(), *new.proj_out.parameters())]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))
    tokens = torch.nn.functional.group_norm(X, 32, new.norm.weight, new.norm.bias).flatten(2).mT
    expected = X + theirs(tokens, tokens, tokens)[0].mT.view_as(X)
    torch.testing.assert_close(new(X), expected, **TIGHT)

    legacy.load_state_dict(new.state_dict())
    assert (legacy(X) - expected).abs().max() > 0.1
    rows = legacy_rows(num_heads)
    legacy.load_state_dict({**new.state_dict(), "qkv.weight": new.qkv.weight[rows], "qkv.bias": new.qkv.bias[rows]})
    torch.testing.assert_close(legacy(X), expected, **TIGHT)


def test_cross_attention_equals_that_of_latent_diffusion():
    ours = with_golden_weights(SpatialTransformer(UNetConfig(**CONFIG, context_dim=12, num_context_tokens=5), CHANNELS))
    theirs = Transformer2DModel(4, 16, CHANNELS, cross_attention_dim=12)
    theirs.load_state_dict(ours.state_dict())  # by the same names
    context = rnd("context", (2, 5, 12))
    expected = theirs(X, encoder_hidden_states=context).sample
    torch.testing.assert_close(ours(X, context), expected, **TIGHT)
    assert (ours(X, context + 1) - expected).abs().max() > 0.01


def test_the_gate_is_gelu():
    ours = GEGLU(8, 12)
    value, gate = ours.proj(X).split(12, dim=-1)
    torch.testing.assert_close(ours(X), value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))))


@pytest.mark.parametrize("fields", [{}, {"scale_shift_norm": False}, {"context_dim": 12, "num_context_tokens": 5}])
def test_a_fresh_branch_is_nothing(fields):
    config, context = UNetConfig(**CONFIG, **fields), rnd("context", (2, 5, 12))
    attend = SpatialTransformer if config.context_dim else AttentionBlock
    stage = Stage(ResBlock(config, CHANNELS, CHANNELS), attend(config, CHANNELS), ResBlock(config, CHANNELS, CHANNELS))
    assert torch.equal(stage(X, EMBEDDING, context), X)
    resampled = Stage(ResBlock(config, CHANNELS, CHANNELS, repeat_pixels))
    assert torch.equal(resampled(X, EMBEDDING), repeat_pixels(X))


def test_dropout_stands_before_the_last_convolution_and_rests_outside_training():
    ours = with_golden_weights(ResBlock(UNetConfig(**CONFIG, dropout=0.3), CHANNELS, CHANNELS))
    seen = []
    ours.out_layers[3].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    torch.manual_seed(0)
    for mode in (True, False):
        ours.train(mode)(X, EMBEDDING)
    trained, evaluated = seen
    kept = trained != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(trained[kept], evaluated[kept] / 0.7)
    assert (evaluated != 0).all()


def test_a_skip_is_joined_after_the_features():
    stage = Stage(torch.nn.Identity())
    assert torch.equal(stage(X, EMBEDDING, None, X + 1), torch.cat([X, X + 1], dim=1))
