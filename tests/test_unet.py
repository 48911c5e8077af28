"""The whole U-Net: against the reference implementation's values and against diffusers, and what its options do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from helpers.forks import in_a_fork
from helpers.golden import UNET_ARRAYS, UNET_FACTS, golden_unet, golden_unet_inputs, rnd, with_golden_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from uvit import UNet, UNetConfig
from uvit.common.errors import InputError
from uvit.integrations.export import export_program
from uvit.networks.unet_layers import AttentionBlock, Downsample, ResBlock, Upsample
from uvit.weights.adm import PUBLISHED_ADM

RELATIVE = 1e-5
ROUNDING = 1e-7
"""Norm of a gradient that is zero but for rounding, as that of a bias which a norm takes away again."""
SMALL = {
    "img_size": 8,
    "in_chans": 1,
    "model_channels": 64,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_sizes": (4,),
    "head_dim": 32,
}
LABELS = {"num_classes": 5, "null_class": True}
CONTEXT = {"context_dim": 12, "num_context_tokens": 3}
OPTIONS = [
    {},
    {**LABELS, **CONTEXT},
    {"scale_shift_norm": False, "resblock_updown": False, "out_chans": 2},
    {"skips": False, "qkv_order": "new", "head_dim": 0, "attention_sizes": (8, 4)},
    {"img_size": (4, 12), "attention_sizes": (2,), "channel_mult": (0.5, 1.5)},
    {"channel_mult": (1,), "attention_sizes": ()},
]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make(**options) -> UNet:
    """A small network without a weight that is zero."""
    return with_golden_weights(UNet(**{**SMALL, **options})).eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", UNET_FACTS["cases"])
def test_output_loss_and_gradients_equal_the_reference(case):
    facts, network = UNET_FACTS["cases"][case], golden_unet(case)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert list(shapes.items()) == list(facts["entries"].items())
    assert network.num_parameters == facts["parameters"]
    output = network(**golden_unet_inputs(network.config))
    assert relative_error(output, torch.from_numpy(UNET_ARRAYS[f"{case}/output"])) < RELATIVE
    assert output.std().item() == pytest.approx(facts["std"], rel=RELATIVE)
    assert output.mean().item() == pytest.approx(facts["mean"], abs=RELATIVE * facts["std"])

    loss = (output - rnd("target", tuple(output.shape))).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(facts["loss"], rel=RELATIVE)
    norms = {name: parameter.grad.norm().item() for name, parameter in network.named_parameters()}
    assert norms == pytest.approx(facts["grad_norm"], rel=RELATIVE, abs=ROUNDING)


@pytest.mark.parametrize("name", PUBLISHED_ADM)
def test_published_sizes(name):
    facts, config = UNET_FACTS["parameter_counts"][name], PUBLISHED_ADM[name]
    with torch.device("meta"):
        network = UNet(config)
    assert network.num_parameters == facts["parameters"] <= config.most_parameters
    assert len(network.state_dict()) == facts["state_dict_entries"]


def test_the_size_of_ddpm_for_cifar10():
    ddpm = {"scale_shift_norm": False, "resblock_updown": False, "attention_sizes": (16,), "num_heads": 1}
    with torch.device("meta"):
        assert UNet(**ddpm, head_dim=0).num_parameters == 35_746_307


PEERS = {ResBlock: ResnetBlock2D, AttentionBlock: Attention, Downsample: Downsample2D, Upsample: Upsample2D}


def as_diffusers(network: UNet) -> UNet2DModel:
    """The network of diffusers with the same sizes and weights; their parts run in the same order."""
    config = network.config
    resampling = "resnet" if config.resblock_updown else "conv"
    plain = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    )
    kinds = [("AttnDownBlock2D", "AttnUpBlock2D") if level.attends else plain for level in config.levels]
    peer = UNet2DModel(
        in_channels=config.in_chans,
        out_channels=config.predicted_chans,
        block_out_channels=[level.channels for level in config.levels],
        down_block_types=[down for down, _ in kinds],
        up_block_types=[up for _, up in reversed(kinds)],
        layers_per_block=config.num_res_blocks,
        downsample_type=resampling,
        upsample_type=resampling,
        resnet_time_scale_shift="scale_shift" if config.scale_shift_norm else "default",
        attention_head_dim=config.head_dim,
        attn_norm_num_groups=32,
        num_class_embeds=config.num_classes or None,
    )

    def load(theirs: nn.Module, weights: Iterable[Tensor]) -> None:
        theirs.load_state_dict(dict(zip(theirs.state_dict(), weights, strict=True)))

    def parts(blocks: Iterable[nn.Module], kind: type[nn.Module]) -> list[nn.Module]:
        modules = [module for block in blocks for module in block.modules()]
        return [module for module in modules if isinstance(module, kind) and list(module.parameters())]

    order = "(H K D)" if config.qkv_order == "legacy" else "(K H D)"
    for kind, peer_kind in PEERS.items():
        peers = parts([*peer.down_blocks, peer.mid_block, *peer.up_blocks], peer_kind)
        for ours, theirs in zip(parts(network.blocks, kind), peers, strict=True):
            if kind is AttentionBlock:
                weight, bias = (
                    rearrange(tensor, f"{order} ... -> K (H D) ...", K=3, D=config.head_dim)
                    for tensor in ours.qkv.parameters()
                )
                separate = [tensor for pair in zip(weight, bias) for tensor in pair]
                tensors = [*ours.norm.parameters(), *separate, *ours.proj_out.parameters()]
                load(theirs, [tensor.squeeze(-1) for tensor in tensors])
            else:
                load(theirs, ours.parameters())
    load(peer.conv_in, network.input_blocks[0].parameters())
    load(peer.time_embedding, network.time_embed.parameters())
    if config.num_classes:
        load(peer.class_embedding, network.label_emb.parameters())
    load(peer.conv_norm_out, network.out[0].parameters())
    load(peer.conv_out, network.out[2].parameters())
    return peer.eval()


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
def test_the_whole_network_equals_that_of_diffusers(adaptive, resblock_updown):
    network = make(
        img_size=(8, 16),
        channel_mult=(1, 2, 2),
        num_res_blocks=2,
        attention_sizes=(4,),
        num_classes=5,
        scale_shift_norm=adaptive,
        resblock_updown=resblock_updown,
        qkv_order="legacy" if adaptive else "new",
    )
    inputs = golden_unet_inputs(network.config)
    with torch.no_grad():
        expected = as_diffusers(network)(inputs["x"], inputs["timesteps"], inputs["y"]).sample
        assert relative_error(network(**inputs), expected) < RELATIVE


@EACH
def test_a_fresh_network_predicts_nothing(options):
    network = UNet(**{**SMALL, **options})
    inputs = golden_unet_inputs(network.config)
    assert torch.equal(network(**inputs), torch.zeros(2, network.config.predicted_chans, *network.config.image_shape))


@EACH
def test_every_option_reaches_every_parameter(options):
    network = make(**options)
    network(**golden_unet_inputs(network.config)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert [name for name, each in gradients.items() if each is None or not each.norm() > ROUNDING] == []


def test_time_and_label_and_context_change_the_output():
    network = make(**LABELS, **CONTEXT)
    inputs = golden_unet_inputs(network.config)
    before = network(**inputs)
    null = torch.full((2,), network.config.null_label)
    changed = {"timesteps": inputs["timesteps"] + 1, "y": null, "context": inputs["context"] + 1}
    for name, value in changed.items():
        assert relative_error(network(**{**inputs, name: value}), before) > 1e-3, name


def test_the_null_class_is_one_more_label():
    assert make(**LABELS).label_emb.num_embeddings == 6
    assert make(num_classes=5).label_emb.num_embeddings == 5


def test_one_time_serves_all_images():
    network, x = make(), rnd("x", (2, 1, 8, 8))
    assert torch.equal(network(x, torch.tensor(7.0)), network(x, torch.tensor([7.0, 7.0])))


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_all_passes_through_the_middle(skips):
    network = make(skips=skips)
    first, last = network.input_blocks[0], network.output_blocks[-1]
    widths = [block[0].in_layers[2].in_channels for block in network.output_blocks]
    assert widths == ([256, 192, 192, 128] if skips else [128, 128, 128, 64])
    seen = []
    last.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs)))
    inputs = golden_unet_inputs(network.config)
    before = network(**inputs)
    assert seen == [4 if skips else 3]
    middle = rnd("middle", (2, 128, 4, 4))
    network.middle_block.register_forward_hook(lambda *_: middle)
    held = network(**inputs)
    assert not torch.equal(held, before)
    first.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(network(**inputs), held) is not skips


def test_dropout_is_for_training_only():
    network, plain = make(dropout=0.5), make()
    inputs = golden_unet_inputs(network.config)
    assert torch.equal(network(**inputs), plain(**inputs))
    network.train()
    assert not torch.equal(network(**inputs), network(**inputs))


def test_resize_keeps_the_weights_and_the_levels_with_attention():
    network = make(img_size=(8, 16), attention_sizes=(4,))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert network.resize((24, 16)) is network
    assert network.config.image_shape == (24, 16) and network.config.attention_sizes == (8,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    inputs = golden_unet_inputs(network.config)
    assert torch.equal(network(**inputs), make(img_size=(24, 16), attention_sizes=(8,))(**inputs))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (9, "img_size must be divisible by 2 for 2 levels of channel_mult, got 9"),
        ("16", "img_size must be int | tuple[int, int], got '16'"),
        ((8, 8, 8), "img_size must be int | tuple[int, int], got (8, 8, 8)"),
        (0, "img_size must be at least 1, got 0"),
    ],
)
def test_resize_refuses_what_cannot_be_halved(size, message):
    network = make()
    before = network.config
    with pytest.raises(InputError) as raised:
        network.resize(size)
    assert str(raised.value) == message and network.config is before


@pytest.mark.parametrize("options", [{}, {"resblock_updown": False, **LABELS, **CONTEXT}], ids=str)
def test_deep_features_replace_all_but_the_outer_blocks(options):
    network = make(**options)
    inputs, ran = golden_unet_inputs(network.config), []
    expected = network(**inputs)
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    for outer in range(network.config.reusable_pairs + 1):
        prediction, deep = network.forward_reusing(**inputs, outer=outer)
        assert torch.equal(prediction, expected)
        ran.clear()
        again, same = network.forward_reusing(**inputs, outer=outer, deep=deep)
        assert torch.equal(again, expected) and same is deep
        assert ran == [*range(outer), *range(9 - outer, 9)]
        other = network.forward_reusing(**inputs, outer=outer, deep=deep.flip(1))[
            0
        ]  # no shift, which a norm takes away
        assert relative_error(other, expected) > 1e-3
    with pytest.raises(InputError, match="outer blocks must be 0 to 4, got 5"):
        network.forward_reusing(**inputs, outer=5)
    _, deep = network.forward_reusing(**inputs, outer=1)
    for other in (deep[:1], deep[:, :, 1:], deep[..., 1:]):
        with pytest.raises(InputError, match="deep must fit to"):
            network.forward_reusing(**inputs, outer=1, deep=other)


@pytest.mark.parametrize("options", [{}, {"skips": False, **LABELS, **CONTEXT}], ids=str)
def test_gradient_checkpointing_changes_nothing(options):
    plain, thrifty = make(**options), make(**options, gradient_checkpointing=True)
    inputs = golden_unet_inputs(plain.config)
    for network, times in ((plain, 1), (thrifty, 2)):  # its blocks are computed again in the backward pass
        calls = []
        for block in network.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        network(**inputs).square().sum().backward()
        assert len(calls) == times * 9
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), thrifty.parameters()))


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.half, 0.02)])
@pytest.mark.parametrize("options", [{}, {"scale_shift_norm": False, **LABELS, **CONTEXT}], ids=str)
def test_half_precision_of_weights_or_by_autocast(options, dtype, error):
    network = make(**options)
    inputs = golden_unet_inputs(network.config)
    exact = network(**inputs)
    with torch.autocast("cpu", dtype):
        rounded = network(**inputs)
    network.to(dtype)
    halved = network(**{name: each.to(dtype) if name in ("x", "context") else each for name, each in inputs.items()})
    for output in (rounded, halved):
        assert output.dtype == dtype
        assert relative_error(output.float(), exact) < error


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_predicts_the_same(duplicate):
    network = make(**LABELS)
    inputs = golden_unet_inputs(network.config)
    assert torch.equal(duplicate(network)(**inputs), network(**inputs))


@in_a_fork
def test_an_exported_program_predicts_the_same_at_any_batch():
    network = make(**LABELS, model_channels=32)
    inputs = golden_unet_inputs(network.config)
    program = export_program(network).module()
    doubled = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    for each in (inputs, doubled):
        torch.testing.assert_close(program(**each), network(**each), rtol=1e-5, atol=1e-5)


INVALID = [
    ({"attention_sizes": (16,)}, "attention_sizes must be among the sides of the levels, 8, 4, got (16,)"),
    ({"img_size": (4, 12)}, "attention_sizes must be among the sides of the levels, 4, 2, got (8,)"),
    ({"channel_mult": (1,) * 5}, "img_size must be divisible by 16 for 5 levels of channel_mult, got 8"),
    ({"img_size": (8, 9)}, "img_size must be divisible by 2 for 2 levels of channel_mult, got (8, 9)"),
    ({"img_size": 2**15}, "img_size must be at most 16,384, got 32768"),
    ({"img_size": 2**11, "attention_sizes": ()}, "attention must see at most 524,288 pixels, got 1,048,576: "),
    ({"model_channels": 48}, "channels must be divisible by 32 groups, got 48 for 1 x model_channels 48"),
    ({"channel_mult": (0.25, 1)}, "channels must be divisible by 32 groups, got 16 for 0.25 x model_channels 64"),
    ({"model_channels": 65}, "model_channels must be even (the time embedding is half cosines), got 65"),
    ({"model_channels": 0}, "model_channels must be at least 1, got 0"),
    (
        {"head_dim": 48},
        "channels with attention must be divisible by head_dim 48, got 64 for 1 x model_channels 64",
    ),
    (
        {"head_dim": 0, "num_heads": 3},
        "channels with attention must be divisible by num_heads 3, got 64 for 1 x model_channels 64",
    ),
    (
        {"head_dim": 48, "channel_mult": (1.5, 1), "attention_sizes": ()},
        "channels with attention must be divisible by head_dim 48, got 64 for 1 x model_channels 64",
    ),
    ({"head_dim": -1}, "head_dim must be at least 0, got -1"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"out_chans": 2}, "out_chans must be None or at least in_chans 3, got 2"),
    ({"channel_mult": ()}, "channel_mult must be one number or more, above 0, got ()"),
    ({"channel_mult": (1, 0)}, "channel_mult must be one number or more, above 0, got (1, 0)"),
    ({"channel_mult": [1, 2]}, "channel_mult must be tuple[float, ...], got [1, 2]"),
    ({"channel_mult": (float("nan"),)}, "channel_mult must be tuple[float, ...], got (nan,)"),
    ({"channel_mult": (1e200,)}, "the sizes of a model must give at most 100,000,000,000 parameters, got up to inf"),
    ({"num_res_blocks": 0}, "num_res_blocks must be at least 1, got 0"),
    ({"num_res_blocks": 999}, "channel_mult and num_res_blocks must give at most 1,000 blocks, got 2,000"),
    ({"qkv_order": "old"}, "qkv_order must be one of 'legacy', 'new', got 'old'"),
    ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ({"null_class": True}, "null_class must be False where num_classes is 0, got True"),
    ({"context_dim": 5}, "context_dim and num_context_tokens must both be 0 or both be above 0, got 5 and 0"),
    ({"context_dim": 5, "num_context_tokens": 2**20}, "num_context_tokens must be at most 524,288, got 1048576"),
    ({"num_channels": 5}, "UNetConfig has no field 'num_channels'"),
]


@pytest.mark.parametrize(("fields", "message"), INVALID, ids=str)
def test_sizes_that_do_not_fit_are_refused_with_both_values(fields, message):
    with pytest.raises(InputError) as raised:
        UNet(UNetConfig(img_size=8, model_channels=64, channel_mult=(1, 2), attention_sizes=(8,)), **fields)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_a_config_of_another_type_is_refused():
    with pytest.raises(InputError, match="config must be a UNetConfig, got 32: give sizes by name"):
        UNet(32)


VALUES = {
    "img_size": [1, 2, 6, (8, 4), (4, 20), 0],
    "out_chans": [None, 3, 2, 0],
    "model_channels": [16, 32, 96, 33],
    "channel_mult": [(1,), (2, 1), (1.5, 0.5), (0.5, 1, 1), (1, 1, 1, 1), (1e-9,), ()],
    "num_res_blocks": [1, 2, 0],
    "attention_sizes": [(), (1,), (2, 4), (8,), (3,), (4, 4)],
    "num_heads": [1, 2, 3],
    "head_dim": [0, 1, 16, 7],
    "qkv_order": ["legacy", "new"],
    "num_classes": [0, 5],
    "context_dim": [0, 12],
    "num_context_tokens": [0, 3],
    **{name: [False, True] for name in ("scale_shift_norm", "resblock_updown", "skips", "null_class")},
}
CHANGES = st.sampled_from([(name, value) for name, values in VALUES.items() for value in values])


@settings(
    max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(st.lists(CHANGES, max_size=6))
def test_a_network_that_is_accepted_runs(changes):
    try:
        config = UNetConfig(**{**SMALL, "model_channels": 32, **dict(changes)})
    except InputError as error:
        assert "\n" not in str(error)
        return
    network = UNet(config)
    inputs = {name: each[:1] for name, each in golden_unet_inputs(config).items()}
    assert network(**inputs).shape == (1, config.predicted_chans, *config.image_shape)
    assert network.num_parameters <= config.most_parameters
    assert len(network.blocks) == 2 * config.num_pairs + 1
