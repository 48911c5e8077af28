"""The U-Net against the published one's numbers, and each of its parts against an independent formula."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from helpers.golden import UNET_ARRAYS, UNET_FACTS, golden_unet, golden_unet_inputs, golden_weights, rnd

from uvit import UNet, UNetConfig
from uvit.common.errors import InputError
from uvit.networks.unet_layers import AttentionBlock, GroupNorm, ResBlock, SpatialTransformer, TransformerBlock
from uvit.weights.adm import PUBLISHED_ADM

CASES = pytest.mark.parametrize("case", UNET_FACTS["cases"])
TINY = UNetConfig(
    img_size=16, in_chans=2, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_sizes=(8,), head_dim=16
)


def with_golden_weights(module):
    module.load_state_dict(golden_weights(module))
    return module


@CASES
def test_outputs_and_gradients_equal_the_published_code(case):
    model, facts = golden_unet(case), UNET_FACTS["cases"][case]
    output = model(**golden_unet_inputs(model.config))
    expected = torch.from_numpy(UNET_ARRAYS[f"{case}/output"])
    assert ((output - expected).norm() / expected.norm()).item() < 1e-5
    loss = (output - rnd("target", tuple(output.shape))).square().mean()
    assert loss.item() == pytest.approx(facts["loss"], rel=1e-5)
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    # A bias before a group norm of single channels has no effect: its gradient is rounding.
    assert norms == pytest.approx(facts["grad_norm"], rel=1e-5, abs=1e-7)


@CASES
def test_names_shapes_and_order_of_tensors_are_the_published_ones(case):
    shapes = {name: list(tensor.shape) for name, tensor in golden_unet(case).state_dict().items()}
    assert list(shapes.items()) == list(UNET_FACTS["cases"][case]["entries"].items())


@pytest.mark.parametrize("name", PUBLISHED_ADM)
def test_published_sizes(name):
    facts = UNET_FACTS["parameter_counts"][name]
    with torch.device("meta"):
        model = UNet(PUBLISHED_ADM[name])
    assert (model.num_parameters, len(model.state_dict())) == (facts["parameters"], facts["state_dict_entries"])


@pytest.mark.parametrize(("scaled", "theirs"), [(True, "scale_shift"), (False, "default")])
def test_a_residual_block_equals_diffusers(scaled, theirs):
    ours = with_golden_weights(ResBlock(dataclasses.replace(TINY, scale_shift_norm=scaled), 32, 64))
    other = ResnetBlock2D(
        in_channels=32, out_channels=64, temb_channels=128, groups=32, eps=1e-5, time_embedding_norm=theirs
    )
    names = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2"}
    names |= {"out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
    weights = ours.state_dict()
    other.load_state_dict(
        {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in names.items() for kind in ("weight", "bias")}
    )
    x, embedding = rnd("x", (2, 32, 8, 8)), rnd("embedding", (2, 128))
    torch.testing.assert_close(ours(x, embedding), other(x, embedding), rtol=1e-5, atol=1e-5)


def test_the_scale_comes_first_and_is_added_to_one():
    block = with_golden_weights(ResBlock(TINY, 32, 32))
    x, embedding = rnd("x", (2, 32, 8, 8)), rnd("embedding", (2, 128))
    h = block.in_layers(x)
    vector = F.linear(F.silu(embedding), block.emb_layers[1].weight, block.emb_layers[1].bias)[:, :, None, None]
    normed = F.group_norm(h, 32, block.out_layers[0].weight, block.out_layers[0].bias)
    expected = x + block.out_layers[3](F.silu(normed * (1 + vector[:, :32]) + vector[:, 32:]))
    torch.testing.assert_close(block(x, embedding), expected)


def test_a_block_that_changes_the_size_resamples_before_its_convolution_and_its_input():
    small, embedding = rnd("x", (2, 32, 4, 4)), rnd("embedding", (2, 128))
    up = with_golden_weights(ResBlock(TINY, 32, 32, lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    plain = with_golden_weights(ResBlock(TINY, 32, 32))
    # Repeating pixels changes no group's statistics, so it may come before everything.
    repeated = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(small, embedding), plain(repeated, embedding), rtol=1e-4, atol=1e-5)


def test_group_norm_is_computed_in_fp32():
    norm = GroupNorm(64)
    x = 1000 + rnd("x", (2, 64, 4, 4))
    found = copy.deepcopy(norm).half()(x.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, norm(x.half().float()).half())


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_self_attention_equals_pytorch(order):
    channels, heads, side = 64, 4, 4
    block = with_golden_weights(AttentionBlock(dataclasses.replace(TINY, qkv_order=order), channels))
    rows = torch.arange(3 * channels)
    if order == "legacy":  # rows of one head: its queries, keys, values
        rows = rows.view(heads, 3, channels // heads).transpose(0, 1).reshape(-1)
    theirs = torch.nn.MultiheadAttention(channels, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(block.qkv.weight[rows, :, 0])
        theirs.in_proj_bias.copy_(block.qkv.bias[rows])
        theirs.out_proj.weight.copy_(block.proj_out.weight[:, :, 0])
        theirs.out_proj.bias.copy_(block.proj_out.bias)
    x = rnd("x", (2, channels, side, side))
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    expected = x + theirs(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_cross_attention_equals_diffusers():
    config = dataclasses.replace(TINY, context_dim=24, num_context_tokens=5)
    ours = with_golden_weights(TransformerBlock(config, 64))
    theirs = BasicTransformerBlock(64, 4, 16, cross_attention_dim=24, activation_fn="geglu")
    theirs.load_state_dict(ours.state_dict())
    x, context = rnd("x", (2, 9, 64)), rnd("context", (2, 5, 24))
    expected = theirs(x, encoder_hidden_states=context)
    torch.testing.assert_close(ours(x, context), expected, rtol=1e-5, atol=1e-5)


def test_a_spatial_transformer_adds_to_its_input():
    config = dataclasses.replace(TINY, context_dim=24, num_context_tokens=5)
    layer = SpatialTransformer(config, 64)
    x, context = rnd("x", (2, 64, 4, 4)), rnd("context", (2, 5, 24))
    torch.testing.assert_close(layer(x, context), x)  # its last convolution starts at zero
    layer = with_golden_weights(layer)
    inside = layer.transformer_blocks[0](layer.proj_in(layer.norm(x)).flatten(2).transpose(1, 2), context)
    torch.testing.assert_close(layer(x, context), x + layer.proj_out(inside.transpose(1, 2).reshape(x.shape)))
    assert layer.norm.eps == 1e-6


def test_a_new_network_predicts_zero_and_its_branches_are_nothing():
    model = UNet(TINY)
    assert not model(rnd("x", (1, 2, 16, 16)), torch.tensor([5.0])).any()
    block, x = model.middle_block[0], rnd("h", (1, 64, 8, 8))
    assert torch.equal(block(x, rnd("embedding", (1, 128))), x)


def test_every_parameter_gets_a_gradient():
    config = dataclasses.replace(
        TINY,
        num_classes=3,
        null_class=True,
        context_dim=6,
        num_context_tokens=2,
        img_size=(8, 16),
        attention_sizes=(4,),
    )
    model = with_golden_weights(UNet(config))
    inputs = {"y": torch.tensor([0, 3]), "context": rnd("context", (2, 2, 6))}
    model(rnd("x", (2, 2, 8, 16)), torch.tensor([3.0, 700.0]), **inputs).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if not parameter.grad.any()]


def test_cut_skips_leave_no_path_around_the_middle():
    for skips, passes in ((True, True), (False, False)):
        model = with_golden_weights(UNet(TINY, skips=skips)).eval()
        x = rnd("x", (2, 2, 16, 16))
        model.middle_block.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        first, second = (model(each, torch.tensor([3.0])) for each in (x, 2 * x + 1))
        assert bool((first - second).abs().max() > 1e-6) == passes


def test_deep_features_are_all_that_the_inner_blocks_give():
    model = with_golden_weights(UNet(TINY)).eval()
    x, later = rnd("x", (2, 2, 16, 16)), torch.tensor([400.0])
    for outer in range(1, TINY.reusable_pairs + 1):
        _, deep = model.forward_reusing(x, torch.tensor([500.0]), outer=outer)
        ran: list[int] = []
        hooks = [
            block.register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
            for number, block in enumerate(model.blocks)
        ]
        reused, _ = model.forward_reusing(x + 0.1, later, outer=outer, deep=deep)
        for hook in hooks:
            hook.remove()
        count = len(model.blocks)
        assert ran == [*range(outer), *range(count - outer, count)]
        assert reused.isfinite().all() and not torch.equal(reused, model(x + 0.1, later))
    prediction, deep = model.forward_reusing(x, later, outer=2)
    assert torch.equal(prediction, model(x, later))
    assert torch.equal(model.forward_reusing(x, later, outer=2, deep=deep)[0], prediction)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = with_golden_weights(UNet(TINY, gradient_checkpointing=checkpointing))
        model(rnd("x", (2, 2, 16, 16)), torch.tensor([3.0])).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_dropout_is_for_training():
    model = with_golden_weights(UNet(TINY, dropout=0.5))
    x, time = rnd("x", (2, 2, 16, 16)), torch.tensor([3.0])
    assert not torch.equal(model(x, time), model(x, time))
    assert torch.equal(model.eval()(x, time), model(x, time))


def test_half_precision_and_autocast_are_near_fp32():
    model = with_golden_weights(UNet(TINY)).eval()
    x, time = rnd("x", (2, 2, 16, 16)), torch.tensor([3.0])
    exact = model(x, time)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, time)
    whole = copy.deepcopy(model).bfloat16()(x.bfloat16(), time)
    for found in (autocast, whole):
        assert ((found.float() - exact).norm() / exact.norm()).item() < 5e-2


def test_resizing_keeps_attention_at_its_levels():
    model = with_golden_weights(UNet(TINY))
    weights = model.state_dict()
    assert model.resize((32, 64)) is model and model.config.attention_sizes == (16,)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model(rnd("x", (1, 2, 32, 64)), torch.tensor([3.0])).shape == (1, 2, 32, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_sizes": (5,)}, r"attention_sizes must be among the sides of the levels, 16, 8, got \(5,\)"),
        ({"channel_mult": (1, 1, 1, 1, 1, 1)}, "img_size must be divisible by 32 for 6 levels of channel_mult, got 16"),
        ({"img_size": 15}, "img_size must be divisible by 2 for 2 levels of channel_mult, got 15"),
        ({"model_channels": 48}, "channels must be divisible by 32 groups, got 48 for 1 x model_channels 48"),
        ({"head_dim": 24}, "channels with attention must be divisible by head_dim 24, got 64"),
        ({"head_dim": 0, "num_heads": 5}, "channels with attention must be divisible by num_heads 5, got 64"),
        ({"out_chans": 1}, "out_chans must be None or at least in_chans 2, got 1"),
        ({"channel_mult": ()}, r"channel_mult must be one number or more, above 0, got \(\)"),
        ({"channel_mult": (1, -2)}, "channel_mult must be one number or more, above 0"),
        ({"model_channels": 33}, "model_channels must be even"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"qkv_order": "old"}, "qkv_order must be one of 'legacy', 'new', got 'old'"),
        ({"num_res_blocks": 10**6}, "must give at most 1,000 blocks"),
        ({"model_channels": 10**9}, "must give at most 100,000,000,000 parameters"),
        ({"skip": "none"}, "UNetConfig has no field 'skip', did you mean 'skips'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        UNet(TINY, **fields)


def test_another_kind_of_config_is_refused():
    with pytest.raises(InputError, match="config must be a UNetConfig, got 32"):
        UNet(32)
