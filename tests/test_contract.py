"""Every network keeps the contract that the rest of the package relies on."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from fnmatch import fnmatch

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch

from uvit import UNet, UNetConfig, UViT, UViTConfig, build_network
from uvit.common.errors import InputError
from uvit.config import WEIGHTS_FILE
from uvit.networks import unet, uvit
from uvit.networks.contract import Network
from uvit.weights.build import NETWORKS

SIZES = {"img_size": 8, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 4}
UNET = {"img_size": 8, "in_chans": 1, "model_channels": 32, "channel_mult": (1, 2), "attention_sizes": (4,)}
AVERAGE = {"takes_interval": True, "takes_guidance": True}
CONDITIONED = {"num_classes": 5, "null_class": True, "context_dim": 12, "num_context_tokens": 3}
CONFIGS = {
    "plain": UViTConfig(**SIZES),
    "conditioned": UViTConfig(**SIZES, **CONDITIONED, **AVERAGE, mlp_time_embed=True, outer_pairs=1),
    "fixed positions": UViTConfig(**SIZES, pos_embed="sincos2d", conv="none", patch_embed="conv"),
    "narrow patches": UViTConfig(**SIZES, patch_bottleneck=3),
    "adaptive norms": UViTConfig(**SIZES, time_conditioning="adaln", skip="add", conv="tokens"),
    "U-Net": UNetConfig(**UNET, head_dim=16, num_res_blocks=1),
    "conditioned U-Net": UNetConfig(**UNET, **CONDITIONED, **AVERAGE, num_res_blocks=1, head_dim=0, dropout=0.1),
    "additive U-Net": UNetConfig(**UNET, scale_shift_norm=False, resblock_updown=False, qkv_order="new"),
    "without skips": UViTConfig(**SIZES, skip="none"),
    "U-Net without skips": UNetConfig(**UNET, skips=False),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def inputs_of(config):
    """Inputs of a network, by name."""
    inputs = {"x": torch.randn(2, config.in_chans, *config.image_shape), "timesteps": torch.tensor([3.0, 700.0])}
    if config.num_classes:
        inputs["y"] = torch.tensor([1, config.null_label])
    if config.context_dim:
        inputs["context"] = torch.randn(2, config.num_context_tokens, config.context_dim)
    if config.takes_interval:
        inputs["interval"] = torch.tensor([1.0, 300.0])
    if config.takes_guidance:
        inputs["guidance"] = torch.tensor([[2.0, 0.1, 0.9], [1.0, 0.0, 1.0]])
    return inputs


def test_every_config_class_has_a_network():
    assert {UViTConfig: UViT, UNetConfig: UNet} == NETWORKS
    assert all(network.config_class is config for config, network in NETWORKS.items())


@EACH
def test_a_network_is_built_from_its_config_alone(config):
    network = build_network(config)
    assert network.config == config and type(config) is network.config_class
    assert network.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    members = {name for name in vars(Network) if not name.startswith("_")} | {*Network.__annotations__}
    assert {"blocks", "forward", "reset_buffers", "muon_fallback"} <= members
    assert not [name for name in members if not hasattr(network, name)]


@EACH
def test_blocks_are_in_the_order_in_which_they_run(config):
    network, ran = build_network(config), []
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    network(**inputs_of(config))
    assert ran == [*range(2 * config.num_pairs + 1)]


@EACH
def test_blocks_give_what_the_config_says(config):
    """The middle one: tokens behind the extra ones, as many in every block, or a map."""
    network, shapes = build_network(config), []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    network(**inputs_of(config))
    width, rows, columns = config.middle_shape
    if config.num_extra_tokens is None:
        assert shapes[config.num_pairs] == (width, rows, columns)
    else:
        assert {*shapes} == {(config.num_extra_tokens + rows * columns, width)}


@EACH
def test_the_public_class_predicts_like_the_one_without_loading(config):
    torch.manual_seed(0)
    built = build_network(config)
    torch.manual_seed(0)
    of_tensors = (unet.UNet if isinstance(built, UNet) else uvit.UViT)(config)
    assert isinstance(built, type(of_tensors)) and type(built) is not type(of_tensors)
    inputs = inputs_of(config)
    assert torch.equal(built.eval()(**inputs), of_tensors.eval()(**inputs))


@EACH
def test_deep_features_can_be_reused_where_the_config_says_so(config):
    network, inputs = build_network(config).eval(), inputs_of(config)
    assert config.reusable_pairs == (config.num_pairs if config.has_skips else 0)
    for outer in range(config.reusable_pairs + 1):
        prediction, deep = network.forward_reusing(**inputs, outer=outer)
        assert torch.equal(prediction, network(**inputs))
        assert torch.equal(network.forward_reusing(**inputs, outer=outer, deep=deep)[0], prediction)


@pytest.mark.parametrize("name", ["conditioned", "conditioned U-Net"])
def test_every_pattern_of_muon_fallback_matches_a_parameter_if_all_modules_are_present(name):
    network = build_network(CONFIGS[name])
    names = [name for name, _ in network.named_parameters()]
    for pattern in network.muon_fallback:
        assert any(fnmatch(name, pattern) for name in names), pattern


@EACH
def test_a_pattern_of_muon_fallback_without_a_match_names_an_absent_module(config):
    network = build_network(config)
    names = [name for name, _ in network.named_parameters()]
    for pattern in network.muon_fallback:
        if not any(fnmatch(name, pattern) for name in names):
            module = getattr(network, pattern.removesuffix(".*"), None)
            assert not isinstance(module, torch.nn.Module) or not list(module.parameters()), pattern
    left = [name for name in names if not any(fnmatch(name, pattern) for pattern in network.muon_fallback)]
    assert all("block" in name or name.startswith("norm.") for name in left)


@EACH
def test_reset_buffers_completes_a_network_that_was_built_on_meta(config):
    expected = build_network(config).eval()
    with torch.device("meta"):
        network = build_network(config).eval()
    network.load_state_dict(expected.state_dict(), assign=True)
    network.reset_buffers()
    assert not any(buffer.is_meta for buffer in network.buffers())
    inputs = inputs_of(config)
    assert torch.equal(network(**inputs), expected(**inputs))


@EACH
def test_a_network_is_resized_in_place(config):
    network = build_network(config)
    assert network.resize((12, 16)) is network
    assert network.config.img_size == (12, 16)
    assert {*build_network(network.config).state_dict()} == {*network.state_dict()}
    assert network(**inputs_of(network.config)).shape == (2, 1, 12, 16)


def test_a_pruned_network_is_not_whole():
    network = build_network(CONFIGS["plain"])
    network.require_whole()
    network.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match="a pruned model only gives intermediates"):
        network.require_whole()


def drawing_network(config):
    """A network whose output depends on everything: no weights are 0, as some are at the start of training."""
    network = build_network(config).eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@EACH
def test_one_time_may_be_a_number(config):
    network, inputs = drawing_network(config), inputs_of(config)
    expected = network(**{**inputs, "timesteps": torch.tensor([500.0, 500.0])})
    assert not torch.equal(network(**{**inputs, "timesteps": 400}), expected)
    for times in (500, 500.0, torch.tensor(500), torch.tensor([500.0])):
        assert torch.equal(network(**{**inputs, "timesteps": times}), expected)


BAD_TYPES = [
    ("x", lambda x: x.double(), r"x must be torch.float32, as the weights are, or under autocast, got torch.float64"),
    ("x", lambda x: x.long(), "x must be a floating point tensor, got one of torch.int64"),
    ("x", lambda x: x.numpy(), "x must be a floating point tensor, got ndarray"),
    ("timesteps", lambda _: "500", "timesteps must be a tensor of real numbers, or one of them, got str"),
    ("timesteps", lambda _: True, "timesteps must be .*, got bool"),
    ("timesteps", lambda _: [1, 2], "timesteps must be .*, got list"),
    ("timesteps", lambda t: t > 5, r"timesteps must be .*, got one of torch\.bool"),
    ("timesteps", lambda t: t * 1j, r"timesteps must be .*, got one of torch\.complex64"),
    ("y", lambda y: y.float(), r"y must be a tensor of int64 or int32, got one of torch\.float32"),
    ("y", lambda y: y.tolist(), "y must be a tensor of int64 or int32, got list"),
    ("y", lambda y: y + 1, "y must be 0 to 5, got 2 to 6"),
    ("y", lambda y: y - 2, "y must be 0 to 5, got -1 to 3"),
    ("context", lambda c: c.half(), r"context must be torch.float32, as .*, got torch.float16"),
    ("context", lambda c: c.tolist(), "context must be a floating point tensor, got list"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_TYPES)
@pytest.mark.parametrize("config", [CONFIGS["conditioned"], CONFIGS["conditioned U-Net"]], ids=["U-ViT", "U-Net"])
def test_inputs_of_another_type_are_refused(config, name, change, message):
    inputs = inputs_of(config)
    with pytest.raises(InputError, match=message):
        build_network(config)(**{**inputs, name: change(inputs[name])})


@EACH
def test_other_precisions_and_functional_transforms(config):
    """Whole networks in other precisions, and those of torch.func over weights, inputs and samples."""
    network, inputs = drawing_network(config), inputs_of(config)
    with torch.no_grad():
        expected = network(**inputs)
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
            other = copy.deepcopy(network).to(dtype)
            cast = {name: each.to(dtype) if name in ("x", "context") else each for name, each in inputs.items()}
            found = other(**cast)
            assert found.dtype == dtype
            assert (found.float() - expected).norm() <= tolerance * expected.norm() + 1e-6
        assert torch.equal(pickle.loads(pickle.dumps(network))(**inputs), expected)
    weights = dict(network.named_parameters())
    called = torch.func.functional_call(network, weights, (), inputs)
    assert torch.equal(called, expected)
    math = build_network(dataclasses.replace(config, attention="math")).eval()
    math.load_state_dict(network.state_dict())
    rest = {name: each for name, each in inputs.items() if name != "x"}
    output, slope = torch.func.jvp(lambda x: math(x, **rest), (inputs["x"],), (torch.ones_like(inputs["x"]),))
    assert torch.allclose(output, expected, atol=1e-5) and slope.shape == output.shape

    def loss(weights, sample):
        batch = {name: each[None] for name, each in sample.items()}
        return torch.func.functional_call(math, weights, (), batch).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, inputs)
    first = torch.func.grad(loss)(weights, {name: value[0] for name, value in inputs.items()})
    assert all(torch.allclose(each[name][0], first[name], atol=1e-5) for name in weights)


@EACH
def test_a_network_survives_to_empty_and_other_default_dtypes(config, tmp_path):
    """Also what is not in its state dict, as part of a larger module."""
    network, inputs = drawing_network(config), inputs_of(config)
    with torch.device("meta"):
        whole = torch.nn.Sequential(build_network(config)).eval()
    whole.to_empty(device="cpu")
    for buffer in whole.buffers():
        assert buffer.isfinite().all()
    whole[0].load_state_dict(network.state_dict())
    assert torch.equal(whole[0](**inputs), network(**inputs))
    network.save_pretrained(tmp_path)
    for include_buffers in (False, True):
        with init_empty_weights(include_buffers=include_buffers):
            empty = build_network(config)
        loaded = load_checkpoint_and_dispatch(empty, str(tmp_path / WEIGHTS_FILE), device_map={"": "cpu"}).eval()
        assert torch.equal(loaded(**inputs), network(**inputs))
        with init_empty_weights(include_buffers=include_buffers):
            empty = build_network(config).eval()
        empty.to_empty(device="cpu").load_state_dict(network.state_dict())
        assert torch.equal(empty(**inputs), network(**inputs))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            other = build_network(config)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {each.dtype for each in (*other.parameters(), *other.buffers())} == {dtype}
        cast = {name: each.to(dtype) if name in ("x", "context") else each for name, each in inputs.items()}
        assert other(**cast).dtype == dtype
