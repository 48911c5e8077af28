from __future__ import annotations

import dataclasses

import pytest
import torch
from einops import rearrange
from helpers.golden import ARRAYS, FACTS, config_of, golden_inputs, golden_model, rnd
from helpers.plain_uvit import plain_uvit, sincos_positions

from uvit import UViT, UViTConfig
from uvit.common.errors import InputError
from uvit.networks import backbone

RELATIVE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("case", ["tiny_uncond", "tiny_class", "tiny_t2i"])
def test_output_loss_and_gradients_equal_the_reference(case, backend):
    facts, reference = FACTS["cases"][case], golden_model(case)
    model = UViT(reference.config, attention=backend)
    model.load_state_dict(reference.state_dict())
    output = model(**golden_inputs(case))
    assert relative_error(output, torch.from_numpy(ARRAYS[f"{case}/output"])) < RELATIVE

    loss = (output - rnd("target", tuple(output.shape))).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(facts["loss"], rel=RELATIVE)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(facts["grad_norm"], rel=RELATIVE)


def test_cifar10_small_equals_the_reference():
    facts = FACTS["cases"]["cifar10_uvit_small"]
    with torch.no_grad():
        output = golden_model("cifar10_uvit_small")(**golden_inputs("cifar10_uvit_small"))
    theirs = torch.from_numpy(ARRAYS["cifar10_uvit_small/output_first256"])
    assert relative_error(output.flatten()[:256], theirs) < RELATIVE
    assert output.std().item() == pytest.approx(facts["std"], rel=RELATIVE)
    assert output.mean().item() == pytest.approx(facts["mean"], abs=RELATIVE * facts["std"])


@pytest.mark.parametrize("name", FACTS["parameter_counts"])
def test_published_sizes(name):
    facts = FACTS["parameter_counts"][name]
    with torch.device("meta"):
        model = UViT(config_of(facts["kwargs"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert len(model.state_dict()) == facts["state_dict_entries"]


OPTIONS = [
    {},
    {"num_classes": 5},
    {"num_classes": 5, "null_class": True, "context_dim": 12, "num_context_tokens": 3},
    {"img_size": (4, 8)},
    {"skip": "add"},
    {"skip": "linear_add"},
    {"skip": "add_linear"},
    {"skip": "none"},
    {"time_conditioning": "adaln", "mlp_time_embed": True},
    {"time_conditioning": "adaln", "num_classes": 5},
    {"conv": "tokens"},
    {"conv": "none"},
    {"patch_size": 4, "patch_bottleneck": 3},
    {"patch_embed": "conv"},
    {"patch_embed": "conv", "patch_size": 4},
    {"patch_embed": "conv", "patch_size": 1, "img_size": 4},
    {"pos_embed": "sincos2d", "img_size": (4, 8)},
    {"qk_norm": True},
    {"qkv_bias": True, "mlp_ratio": 2.5},
]


def random_inputs(config: UViTConfig, batch: int = 3) -> dict[str, torch.Tensor]:
    inputs = {
        "x": torch.randn(batch, config.in_chans, *config.image_shape),
        "timesteps": torch.linspace(1, 999, batch),
    }
    if config.num_classes:
        inputs["y"] = torch.arange(batch)
    if config.context_dim:
        inputs["context"] = torch.randn(batch, config.num_context_tokens, config.context_dim)
    return inputs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_computes_what_the_formulas_say(tiny, options):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny, **options)
    model = UViT(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = {name: each.double() if name != "y" else each for name, each in random_inputs(config).items()}
    inputs["timesteps"] = inputs["timesteps"] / 100  # whose embedding in float32 is as good as exact
    expected = plain_uvit(model.state_dict(), config, **inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_reaches_every_parameter(tiny, options):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny, **options)
    model, inputs = UViT(config), random_inputs(config)
    output = model(**inputs)
    assert output.shape == inputs["x"].shape
    output.square().sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untouched == []


@pytest.mark.parametrize("options", [{}, {"time_conditioning": "adaln"}, {"skip": "add"}], ids=str)
def test_gradient_checkpointing_changes_nothing(tiny, options, monkeypatch):
    config = dataclasses.replace(tiny, **options)
    plain, inputs = UViT(config), random_inputs(config)
    thrifty = UViT(config, gradient_checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    for model, times in ((plain, 1), (thrifty, 2)):  # its blocks are computed again in the backward pass
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(**inputs).square().sum().backward()
        assert len(calls) == times * (config.depth + 1)
    monkeypatch.setattr(backbone, "checkpoint", None)  # not needed where no gradient is
    with torch.no_grad():
        assert torch.equal(thrifty(**inputs), plain(**inputs))
    for ours, theirs in zip(plain.parameters(), thrifty.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_time_and_label_and_context_change_the_output(tiny):
    config = dataclasses.replace(tiny, num_classes=5, context_dim=12, num_context_tokens=3)
    model, inputs = UViT(config), random_inputs(config)
    before = model(**inputs)
    changed = {"timesteps": inputs["timesteps"] + 1, "y": inputs["y"] + 1, "context": inputs["context"] + 1}
    for name, value in changed.items():
        assert not torch.equal(before, model(**{**inputs, name: value})), name


def test_initial_weights_equal_those_of_the_paper():
    torch.manual_seed(0)
    model = UViT(UViTConfig(img_size=16, embed_dim=256, depth=2, num_heads=4, num_classes=50))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.mid_block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.mid_block.mlp.fc1.bias.abs().max() == 0
    assert model.label_emb.weight.std().item() == pytest.approx(1, rel=0.05)
    weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
    assert weight.abs().max() <= 12**-0.5 and bias.any()  # PyTorch's default, ±1 / √fan-in
    assert all(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if name.endswith("weight"))


def test_an_adaptive_norm_starts_as_a_plain_one(tiny):
    norm = UViT(tiny, time_conditioning="adaln").mid_block.norm2
    assert torch.equal(norm.proj.bias, torch.cat([torch.ones(32), torch.zeros(32)]))
    assert norm.proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_resize_changes_the_patch_part_of_the_positions_only(tiny):
    model = UViT(tiny, num_classes=5)
    before = model.pos_embed.detach().clone()
    assert model.resize((12, 16)) is model
    assert model.config.image_shape == (12, 16)
    assert torch.equal(model.pos_embed[:, :2], before[:, :2])
    assert model.pos_embed.shape == (1, 2 + 6 * 8, 32)
    assert model(**random_inputs(model.config)).shape == (3, 1, 12, 16)
    # A constant stays constant under interpolation, whatever its size.
    flat = UViT(tiny)
    with torch.no_grad():
        flat.pos_embed.copy_(torch.ones_like(flat.pos_embed))
    torch.testing.assert_close(flat.resize(16).pos_embed, torch.ones(1, 1 + 64, 32))


def test_resize_interpolates_positions_row_by_row(tiny):
    model = UViT(tiny, img_size=(4, 8))
    before = model.pos_embed.detach()[:, 1:].mT.unflatten(2, (2, 4))
    model.resize((12, 8))
    expected = torch.nn.functional.interpolate(before, (6, 4), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:].mT.unflatten(2, (6, 4)), expected)
    assert model.patch_embed.img_size == (12, 8) and model.patch_embed.grid_size == (6, 4)
    model.pos_embed.requires_grad_(False)
    assert not model.resize(8).pos_embed.requires_grad


def test_a_bottleneck_is_two_linear_maps_of_a_patch(tiny):
    torch.manual_seed(0)
    model = UViT(tiny, img_size=(8, 12), patch_size=4, in_chans=3, patch_bottleneck=5)
    x = torch.randn(2, 3, 8, 12)
    patches = rearrange(x, "B C (h p) (w q) -> B (h w) (C p q)", p=4, q=4)
    first, second = model.patch_embed.proj, model.patch_embed.expand
    assert first.bias is None and first.weight.shape == (5, 3, 4, 4)
    expected = patches @ first.weight.flatten(1).T @ second.weight.flatten(1).T + second.bias
    torch.testing.assert_close(model.patch_embed(x), expected)
    assert torch.linalg.matrix_rank((model.patch_embed(x) - second.bias).flatten(0, 1), tol=1e-5) == 5
    resized = model.resize((16, 8))
    assert resized.patch_embed.grid_size == (4, 2)
    assert resized(torch.randn(2, 3, 16, 8), torch.tensor([3.0, 700.0])).shape == (2, 3, 16, 8)
    assert {key for key in resized.state_dict() if key.startswith("patch_embed.")} == {
        "patch_embed.proj.weight",
        "patch_embed.expand.weight",
        "patch_embed.expand.bias",
    }


@pytest.mark.parametrize("width", [1, 5_000])
def test_the_bound_on_parameters_counts_a_bottleneck(tiny, width):
    model = UViT(tiny, patch_bottleneck=width)
    assert model.num_parameters <= model.config.most_parameters
    assert model.num_parameters - UViT(tiny).num_parameters == width * (4 + 32) - 4 * 32


def test_fixed_positions_are_those_of_rows_and_columns(tiny):
    positions = UViT(tiny, pos_embed="sincos2d", img_size=(4, 8), num_classes=3).pos_embed
    assert not positions[:, :2].any()
    torch.testing.assert_close(positions[0, 2:], sincos_positions(2, 4, 32).float())
    elsewhere = UViT(tiny, pos_embed="sincos2d").to("meta")
    elsewhere.reset_buffers()
    assert elsewhere.pos_embed.is_meta


def test_resize_recomputes_fixed_positions(tiny):
    resized, fresh = UViT(tiny, pos_embed="sincos2d").resize(16), UViT(tiny, pos_embed="sincos2d", img_size=16)
    torch.testing.assert_close(resized.pos_embed, fresh.pos_embed)


def test_resize_refuses_what_patches_do_not_divide(tiny):
    model = UViT(tiny)
    with pytest.raises(InputError, match=r"divisible by patch_size 2, got 9"):
        model.resize(9)
    assert model.config == tiny


def test_half_precision_and_autocast(tiny):
    model, inputs = UViT(tiny, qk_norm=True), random_inputs(tiny)
    exact = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(**inputs)
    assert rounded.dtype == torch.bfloat16
    assert relative_error(rounded.float(), exact) < 0.05
    half = UViT(tiny).bfloat16()
    assert half(inputs["x"].bfloat16(), inputs["timesteps"]).dtype == torch.bfloat16


BAD_INPUTS = [
    ({"x": torch.zeros(2, 1, 8, 9)}, r"x must be \(B, 1, 8, 8\), got \(2, 1, 8, 9\)"),
    ({"x": torch.zeros(2, 3, 8, 8)}, r"x must be \(B, 1, 8, 8\), got \(2, 3, 8, 8\)"),
    ({"timesteps": torch.zeros(3)}, r"timesteps must be \(2,\), got \(3,\)"),
    ({"y": None}, r"num_classes 5 takes y, got none"),
    ({"y": torch.zeros(2, 1, dtype=torch.long)}, r"y must be \(2,\), got \(2, 1\)"),
    ({"context": None}, r"context_dim 12 takes context, got none"),
    ({"context": torch.zeros(2, 4, 12)}, r"context must be \(2, 3, 12\), got \(2, 4, 12\)"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUTS)
def test_errors_name_both_shapes(tiny, changed, message):
    config = dataclasses.replace(tiny, num_classes=5, context_dim=12, num_context_tokens=3)
    with pytest.raises(InputError, match=message):
        UViT(config)(**{**random_inputs(config, batch=2), **changed})


def test_conditions_are_refused_by_a_model_without_them(tiny):
    inputs = random_inputs(tiny, batch=2)
    with pytest.raises(InputError, match="num_classes 0 takes no y, got labels"):
        UViT(tiny)(**inputs, y=torch.zeros(2, dtype=torch.long))
    with pytest.raises(InputError, match="context_dim 0 takes no context, got context"):
        UViT(tiny)(**inputs, context=torch.zeros(2, 3, 4))


def test_resize_to_the_same_size_keeps_the_parameter(tiny):
    model = UViT(tiny)
    before = model.pos_embed
    assert model.resize(8).pos_embed is before


def test_a_config_of_another_type_is_refused():
    with pytest.raises(InputError, match="config must be a UViTConfig, got 32"):
        UViT(32)


def test_an_unknown_field_is_refused(tiny):
    with pytest.raises(InputError, match="no field 'image_size'"):
        UViT(image_size=32)


CONDITIONED = {"num_classes": 5, "null_class": True, "context_dim": 12, "num_context_tokens": 3}


def test_intermediates_equal_the_outputs_of_the_blocks(tiny):
    model = UViT(tiny, num_classes=5).eval()
    seen = []
    for block in [*model.in_blocks, model.mid_block, *model.out_blocks]:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x, timesteps, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    with torch.no_grad():
        output = model(x, timesteps, y)
        expected = seen[:]
        last, found = model.forward_intermediates(x, output_fmt="NLC", timesteps=timesteps, y=y)
        assert torch.equal(last, model.norm(expected[-1]))
        assert torch.equal(model._to_image(expected[-1]), output)
        assert len(found) == tiny.depth + 1
        assert all(torch.equal(ours, theirs[:, 2:]) for ours, theirs in zip(found, expected))
        images = model.forward_intermediates(x, intermediates_only=True, timesteps=timesteps, y=y)
        assert all(torch.equal(a.flatten(2).mT, b) for a, b in zip(images, found))
        normed = model.forward_intermediates(
            x, [2], True, True, output_fmt="NLC", intermediates_only=True, timesteps=timesteps, y=y
        )
        assert torch.equal(torch.cat(normed[0][::-1], dim=1), model.norm(expected[2]))


def test_intermediates_may_come_as_a_dict(tiny):
    model, x = UViT(tiny).eval(), torch.randn(2, 1, 8, 8)
    tokens, patches = model.forward_intermediates(x, [1, 3])
    expected = {"image_intermediates": patches, "image_features": tokens}
    prefixes = [pair[1] for pair in model.forward_intermediates(x, [1, 3], True, intermediates_only=True)]
    assert [tuple(each.shape) for each in prefixes] == [(2, 1, 32)] * 2
    for names, options in (
        ({"image_intermediates"}, {"intermediates_only": True}),
        ({"image_intermediates", "image_features"}, {}),
        ({"image_intermediates", "image_features", "image_intermediates_prefix"}, {"return_prefix_tokens": True}),
    ):
        found = model.forward_intermediates(x, [1, 3], output_dict=True, **options)
        assert found.keys() == names
        for name in names:
            torch.testing.assert_close(found[name], {**expected, "image_intermediates_prefix": prefixes}[name])


def test_blocks_after_the_last_chosen_one_are_left_out(tiny):
    model, x = UViT(tiny).eval(), torch.randn(2, 1, 8, 8)
    calls = []
    model.out_blocks[1].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        whole = model.forward_intermediates(x, [-3, 0], intermediates_only=True)
        assert calls == [1]
        early = model.forward_intermediates(x, [-3, 0], stop_early=True, intermediates_only=True)
        assert calls == [1]
        assert all(torch.equal(a, b) for a, b in zip(whole, early)) and len(early) == 2
        assert len(model.forward_intermediates(x, 2)[1]) == 2


def test_by_default_features_are_those_of_a_clean_unlabelled_image(tiny):
    model = UViT(tiny, **CONDITIONED).eval()
    x, context = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 12)
    null, other = torch.tensor([5, 5]), torch.tensor([1, 2])
    with torch.no_grad():
        default = model.forward_intermediates(x, context=context)[0]
        given = model.forward_intermediates(x, timesteps=torch.tensor(0.0), y=null, context=context)[0]
        assert torch.equal(default, given)
        assert not torch.equal(default, model.forward_intermediates(x, y=other, context=context)[0])


def test_intermediates_have_the_shape_of_the_grid(tiny):
    model = UViT(tiny, img_size=(8, 16))
    found = model.forward_intermediates(torch.randn(1, 1, 8, 16), 1, intermediates_only=True)
    assert found[0].shape == (1, 32, 4, 8)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"indices": [5]}, "indices must be -5 to 4, got 5"),
        ({}, {"indices": 6}, "indices must be 1 to 5 for the last blocks, got 6"),
        ({}, {"output_fmt": "NHWC"}, "output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"),
        ({"num_classes": 5}, {}, "a model with num_classes 5 takes y, got none"),
        (CONDITIONED, {}, "a model with context_dim 12 takes context, got none"),
    ],
)
def test_invalid_intermediates_are_refused(tiny, fields, arguments, message):
    with pytest.raises(InputError, match=message):
        UViT(tiny, **fields).forward_intermediates(torch.randn(1, 1, 8, 8), **arguments)


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


def test_too_many_outer_blocks_are_refused(tiny: UViTConfig):
    for outer in (3, -1):
        with pytest.raises(InputError, match=f"outer blocks must be 0 to 2, got {outer}"):
            UViT(tiny).forward_reusing(X, TIMES, outer=outer)


def test_deep_features_of_other_shapes_are_refused(tiny: UViTConfig):
    model = UViT(tiny).eval()
    for deep in (torch.randn(1, 17, 32), torch.randn(2, 16, 32), torch.randn(2, 17, 16)):
        with pytest.raises(
            InputError, match=rf"deep must fit to \(2, 17, 32\), got \({', '.join(map(str, deep.shape))}\)"
        ):
            model.forward_reusing(X, TIMES, outer=1, deep=deep)


def test_every_parameter_of_the_outer_blocks_still_gets_a_gradient(tiny: UViTConfig):
    model = UViT(tiny)
    _, deep = model.forward_reusing(X, TIMES, outer=1)
    model.forward_reusing(X, TIMES, outer=1, deep=deep.detach())[0].square().mean().backward()
    outer = [*model.in_blocks[:1].parameters(), *model.out_blocks[-1:].parameters()]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in outer)
    assert all(parameter.grad is None for parameter in model.mid_block.parameters())


def test_a_pruned_model_neither_predicts_nor_saves(tmp_path):
    model = UViT(embed_dim=32, depth=4, num_heads=4, num_classes=0)
    model.prune_intermediate_layers([3], prune_head=False)
    for use in (lambda: model(torch.randn(1, 3, 32, 32), torch.zeros(1)), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(InputError, match="a pruned model only gives intermediates"):
            use()
    assert not list(tmp_path.iterdir())


def test_pruning_removes_what_is_told_to_go(tiny):
    x = torch.randn(1, 1, 8, 8)
    for norm, head in ((False, False), (False, True), (True, False), (True, True)):
        model = UViT(tiny)
        tokens, found = model.forward_intermediates(x, [1, 3], stop_early=True)
        assert model.prune_intermediate_layers([1, -2], prune_norm=norm, prune_head=head) == [1, 3]
        assert (len(model.out_blocks), len(model.in_blocks)) == (1, 2)
        identities = [
            isinstance(part, torch.nn.Identity) for part in (model.norm, model.decoder_pred, model.final_layer)
        ]
        assert identities == [norm, head, head]
        left, again = model.forward_intermediates(x, [1, 3])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, found))
        assert torch.equal(left, tokens) != norm
    model = UViT(tiny)
    model.prune_intermediate_layers([0])
    assert len(model.out_blocks) == 0 and model.forward_intermediates(x, [0])[1]


@pytest.mark.parametrize("indices", ["abc", 1.5, ["1"], [0.5]])
def test_indices_of_blocks_must_be_whole_numbers(indices):
    model = UViT(embed_dim=32, depth=4, num_heads=4, num_classes=0)
    with pytest.raises(InputError, match="indices must be whole numbers, got"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), indices)
