"""What alignment adds to the loss: each term against a plain formula, what takes a gradient, and what is watched."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from uvit import Config, UViT
from uvit.config import DataConfig, InputError, ProcessConfig, SampleConfig, TrainConfig, UNetConfig, UViTConfig
from uvit.data.batch import Batch
from uvit.networks.encoders import NO_ENCODERS, Encoders
from uvit.training.alignment import (
    Aligned,
    alignment_by_cosine,
    build_projector,
    dispersion,
    outputs_of,
    patch_tokens,
    sharpened,
    watched_blocks,
    with_projector,
)
from uvit.training.step import training_loss
from uvit.weights.build import build_network
from uvit.weights.timm_network import PatchEncoder

MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=4, num_heads=2, num_classes=10, null_class=True)
FIELDS = dict(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_sizes=(4,), head_dim=16)
UNET = UNetConfig(img_size=8, in_chans=1, num_classes=10, null_class=True, **FIELDS)
CPU = torch.device("cpu")


def batch_of(count=8):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(pixels, torch.arange(count), [])


def settings(kind, weight=None, **fields):
    encoder = "timm:test_vit" if "repa" in kind else None
    return TrainConfig(alignment=kind, alignment_weight=weight, alignment_encoder=encoder, **fields)


def test_cosine_of_parallel_opposite_and_orthogonal_tokens():
    tokens, targets = torch.tensor([[[2.0, 0.0]] * 4]), torch.tensor([[[3.0, 0], [0.5, 0], [-1, 0], [0, 7]]])
    assert alignment_by_cosine(tokens[:, :2], targets[:, :2]).item() == pytest.approx(-1)
    assert alignment_by_cosine(tokens, targets).item() == pytest.approx(-(1 + 1 - 1 + 0) / 4)


def test_targets_of_the_cosine_take_no_gradient():
    tokens, targets = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(2))
    alignment_by_cosine(tokens, targets).backward()
    assert targets.grad is None and tokens.grad.abs().min() > 0


def test_dispersion_of_two_images_at_a_known_distance():
    """Four pairs: two of an image with itself, at 0, and two at the mean square 3² / 6."""
    z = torch.zeros(2, 3, 2)
    z[1, 0, 0] = 3.0
    assert dispersion(z).item() == pytest.approx(math.log((1 + math.exp(-9 / 6)) / 2))
    assert dispersion(z[:1]).item() == dispersion(z[:1].expand(5, -1, -1)).item() == 0


def test_dispersion_equals_the_full_matrix_and_spreads_the_images():
    z = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    flat = z.flatten(1)
    expected = (-(flat[:, None] - flat).square().mean(dim=-1)).exp().mean().log()
    torch.testing.assert_close(dispersion(z), expected)
    (gradient,) = torch.autograd.grad(dispersion(z), z)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])
    before, after = (each.flatten(1).var(dim=0).sum() for each in (z, z - gradient))
    assert after > before


def test_sharpened_patches():
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)) + 3
    found = sharpened(x)
    mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    torch.testing.assert_close(found.std(dim=1), torch.ones(2, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.mean(dim=1, keepdim=True), 0.4 * mean / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "layersync", "dispersive", "repa"),
    [(2, [0, 1], [0], [1]), (4, [1, 2], [0], [2]), (12, [3, 8], [2], [6]), (28, [9, 18], [6], [14])],
)
def test_blocks_are_chosen_by_depth(depth, layersync, dispersive, repa):
    model = UViTConfig(depth=depth)
    assert watched_blocks("layersync", model) == layersync
    assert watched_blocks("dispersive", model) == dispersive
    assert watched_blocks("repa", model) == watched_blocks("irepa", model) == repa


def test_patches_of_tokens_and_of_a_map():
    tokens = torch.randn(2, 2 + 16, 16)  # a label, the time, 4 x 4 patches
    assert torch.equal(patch_tokens(tokens, MODEL), tokens[:, 2:])
    assert torch.equal(patch_tokens(tokens[:, :7], MODEL), tokens[:, 2:7])  # of a block that sees some of them
    image = torch.randn(2, 5, 3, 4)
    assert torch.equal(patch_tokens(image, UNET)[:, 5], image[:, :, 1, 1])


def test_outputs_are_those_of_a_call_with_a_gradient():
    blocks = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with outputs_of(blocks, [0, 2]) as found:
        with torch.no_grad():
            blocks[0](torch.ones(2))
        assert not found
        first, _, last = (block(torch.ones(2)) for block in blocks)
    blocks[0](torch.zeros(2))
    assert [*found] == [0, 2] and found[0] is first and found[2] is last
    assert not any(block._forward_hooks for block in blocks)


def trained(config, encoders=NO_ENCODERS, seed=0):
    """A network as it is trained, with one step's loss backpropagated; and the loss."""
    torch.manual_seed(seed)
    network = build_network(config.model)
    if isinstance(config.model, UNetConfig):  # whose last convolution begins as zeros
        nn.init.normal_(network.out[-1].weight, std=0.1)
    module = with_projector(network, build_projector(config, encoders, CPU), config)
    loss = training_loss(module, config, encoders, batch_of(), torch.Generator().manual_seed(3))
    loss.backward()
    return module, loss.item()


@pytest.fixture(scope="module")
def patches(vit):
    return PatchEncoder("test_vit", str(vit), (4, 4))


KINDS = ("layersync", "dispersive", "repa", "irepa")
EACH = [(kind, MODEL) for kind in KINDS] + [(kind, UNET) for kind in KINDS[1:]]  # LayerSync refuses maps


@pytest.mark.parametrize(("kind", "model"), EACH)
def test_a_term_adds_its_gradient_and_not_its_value(kind, model, patches):
    """The gradient is the sum of both; that of the term alone ends where it is watched."""
    encoders = Encoders(patches=patches) if "repa" in kind else NO_ENCODERS
    plain, loss = trained(Config(model=model))
    half, full = (trained(Config(model=model, train=settings(kind, weight)), encoders) for weight in (0.5, 1.0))
    assert loss == half[1] == full[1]
    differ = {}
    for name, parameter in plain.named_parameters():
        one, two = (dict(each.network.named_parameters())[name].grad - parameter.grad for each, _ in (half, full))
        torch.testing.assert_close(two, 2 * one, rtol=1e-2, atol=1e-6)
        differ[name] = two.abs().max().item()
    names = {parameter: name for name, parameter in plain.named_parameters()}
    inside = [[differ[names[parameter]] for parameter in block.parameters()] for block in plain.blocks]
    last = watched_blocks(kind, model)[0]  # the second one of LayerSync takes no gradient
    assert all(max(each) > 1e-6 for each in inside[: last + 1])
    assert all(max(each) == 0 for each in inside[last + 1 :])
    if full[0].projector is not None:
        assert all(p.grad.abs().max() > 0 for p in full[0].projector.parameters())
        assert not any(p.requires_grad or p.grad is not None for p in patches.parameters())
    assert full[0].term.item() == half[0].term.item() != 0


@pytest.mark.parametrize(("kind", "model"), EACH)
def test_weight_0_leaves_the_gradient_as_it_is(kind, model):
    plain, loss = trained(Config(model=model))
    zero, same = trained(Config(model=model, train=settings(kind, 0.0)))
    assert loss == same and type(zero) is type(plain)
    for one, other in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_repa_compares_what_the_network_saw_with_what_the_encoder_sees(patches):
    """The term against a plain computation: flips are those of the network, extra tokens take no part."""
    config = Config(model=MODEL, train=settings("repa"), data=DataConfig(flip=True))
    seen = []
    encoders = Encoders(patches=nn.Module())
    encoders.patches.width = patches.width
    encoders.patches.forward = lambda images: seen.append(images) or patches(images)
    module, _ = trained(config, encoders)
    (images,) = seen
    given = batch_of().images / 127.5 - 1
    flipped = [torch.equal(image, each.flip(-1)) for image, each in zip(images, given)]
    assert {*flipped} == {True, False}
    assert all(flip or torch.equal(image, each) for flip, image, each in zip(flipped, images, given))
    tokens = []
    module.network.mid_block.register_forward_hook(lambda *hooked: tokens.append(hooked[-1]))
    training_loss(module, config, encoders, batch_of(), torch.Generator().manual_seed(3))
    projected, targets = module.projector(tokens[0][:, 2:]), patches(images)
    expected = -(projected * targets).sum(dim=-1) / projected.norm(dim=-1) / targets.norm(dim=-1)
    torch.testing.assert_close(module.term, expected.mean().detach())


@pytest.mark.parametrize("kind", ["layersync", "repa"])
@pytest.mark.parametrize("outer_pairs", [1, 2])
def test_blocks_that_see_some_patches_are_compared_at_those(kind, outer_pairs, patches):
    """The term against a plain computation, image by image; a block that sees all is compared at the same ones."""
    model = dataclasses.replace(MODEL, outer_pairs=outer_pairs)
    fields = {"token_keep": 0.5, "token_choice": "random", "path_drop": 0.0}
    config = Config(model=model, train=settings(kind, **fields))
    encoders = Encoders(patches=patches) if kind == "repa" else NO_ENCODERS
    module, _ = trained(config, encoders)
    given, outputs = {}, {}
    module.register_forward_pre_hook(lambda _, args, named: given.update(named), with_kwargs=True)
    for number in watched_blocks(kind, model):
        module.network.blocks[number].register_forward_hook(lambda *hooked, n=number: outputs.update({n: hooked[-1]}))
    training_loss(module, config, encoders, batch_of(), torch.Generator().manual_seed(3))
    seen = []
    for number, output in outputs.items():
        inner = outer_pairs <= number < len(module.network.blocks) - outer_pairs
        rows = [own[2:] if inner else own[2:][kept] for own, kept in zip(output, given["kept"])]
        seen.append(torch.stack(rows))
    if kind == "repa":
        whole = patches(batch_of().images / 127.5 - 1)
        seen = [module.projector(seen[0]), torch.stack([own[kept] for own, kept in zip(whole, given["kept"])])]
    assert seen[0].shape[:2] == (8, 8)  # images, patches
    torch.testing.assert_close(module.term, -torch.cosine_similarity(*seen, dim=-1).mean().detach())


@pytest.mark.parametrize("kind", ["layersync", "repa"])
def test_recomputed_blocks_give_the_same_gradients(kind, patches):
    encoders = Encoders(patches=patches) if kind == "repa" else NO_ENCODERS
    config = Config(model=MODEL, train=settings(kind))
    again = Config(model=UViTConfig(**{**vars(MODEL), "gradient_checkpointing": True}), train=settings(kind))
    (one, loss), (other, same) = (trained(each, encoders) for each in (config, again))
    assert loss == same
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_only_the_call_with_a_gradient_counts_in_an_average_velocity():
    """Which calls the network some more times, on fewer images, without one."""
    fields = {**vars(MODEL), "takes_interval": True}
    process, model = ProcessConfig(objective="average"), UViTConfig(**fields)
    config = Config(model=model, process=process, sample=SampleConfig(sampler="average"), train=settings("layersync"))
    shapes = []
    torch.manual_seed(0)
    network = UViT(model)
    with outputs_of(network.blocks, [1, 2]) as found:
        network.blocks[1].register_forward_hook(lambda *hooked: shapes.append(len(hooked[-1])))
        module = Aligned(network, None)
        training_loss(module, config, NO_ENCODERS, batch_of(), torch.Generator())
    assert len(shapes) > 1 and min(shapes) < 8 and {len(output) for output in found.values()} == {8}
    expected = alignment_by_cosine(*(patch_tokens(output, model) for output in found.values()))
    assert torch.equal(module.term, expected.detach())


def test_projectors_have_the_published_shapes_and_a_generator_of_their_own(patches):
    encoders = Encoders(patches=patches)
    before = torch.random.get_rng_state()
    mlp, again, other = (
        build_projector(Config(model=MODEL, train=settings("repa", seed=seed)), encoders, CPU) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [tuple(each.weight.shape) for each in mlp if hasattr(each, "weight")] == [(64, 16), (64, 64), (64, 64)]
    assert torch.equal(mlp[0].weight, again[0].weight) and not torch.equal(mlp[0].weight, other[0].weight)
    conv = build_projector(Config(model=MODEL, train=settings("irepa")), encoders, CPU)
    tokens = torch.zeros(1, 16, 16)
    tokens[0, 5] = 1.0
    changed = (conv(tokens) - conv(torch.zeros_like(tokens))).abs().sum(dim=-1).reshape(4, 4) > 1e-6
    assert changed.nonzero().tolist() == [[row, column] for row in range(3) for column in range(3)]
    assert build_projector(Config(model=MODEL), NO_ENCODERS, CPU) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alignment": "repa"}, "alignment_encoder must be 'timm:MODEL' with alignment 'repa', got None"),
        (
            {"alignment": "irepa", "alignment_encoder": "dino"},
            "must be 'timm:MODEL' with alignment 'irepa', got 'dino'",
        ),
        ({"alignment_encoder": "timm:vit"}, "alignment_encoder must be None with alignment 'none', got 'timm:vit'"),
        (
            {"alignment": "layersync", "alignment_encoder_weights": "a"},
            "must be None with alignment 'layersync', got 'a'",
        ),
        ({"alignment": "layersync", "alignment_weight": -1.0}, "alignment_weight must be None or at least 0, got -1.0"),
        ({"alignment_weight": 0.5}, "alignment_weight must be None with alignment 'none', got 0.5"),
        ({"alignment": "dispersive", "compile": "graphs"}, "compile must be another with alignment 'dispersive', got"),
        ({"alignment": "layersink"}, "did you mean 'layersync'?"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        TrainConfig(**fields)


def test_networks_and_data_that_are_refused():
    with pytest.raises(InputError, match="'layersync' needs blocks that all give tokens of one size, got a U-Net: use"):
        Config(model=UNET, train=settings("layersync"))
    with pytest.raises(InputError, match=r"'repa' needs a model of pixels, got data\.autoencoder 'vae'"):
        Config(train=settings("repa"), data=DataConfig(autoencoder="vae"))
    inner = dataclasses.replace(MODEL, outer_pairs=1)
    with pytest.raises(InputError, match=r"'irepa' needs train.token_keep 1, got 0.5: use 'repa'"):
        Config(model=inner, train=settings("irepa", token_keep=0.5))
    assert Config(train=settings("layersync"), data=DataConfig(autoencoder="vae")).train.alignment_factor == 0.2
