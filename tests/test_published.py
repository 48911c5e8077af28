"""The paper's ten published runs, against its tables and the reference's parameter counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.golden import FACTS, config_of

from uvit import UViT
from uvit.config import UViTConfig, load_config
from uvit.diffusion.process import sample_times
from uvit.diffusion.samplers import num_evaluations
from uvit.weights.published import (
    PUBLISHED,
    PUBLISHED_UVIT,
    SD_AUTOENCODER,
    SD_AUTOENCODER_EMA,
    SIZES,
    infer_config,
)

CONFIGS = Path(__file__).parent.parent / "configs"


# steps (thousands), batch, lr, betas, warm-up, label dropout, schedule, sampler, evaluations, w
TABLE = {
    "cifar10_uvit_small": (500, 128, 2e-4, (0.99, 0.999), 2500, 0, "vp", "euler_maruyama", 1000, 1),
    "celeba64_uvit_small": (500, 128, 2e-4, (0.99, 0.99), 5000, 0, "vp", "euler_maruyama", 1000, 1),
    "imagenet64_uvit_mid": (300, 1024, 3e-4, (0.99, 0.99), 5000, 0, "vp", "dpm_solver_fast", 50, 1),
    "imagenet64_uvit_large": (300, 1024, 3e-4, (0.99, 0.99), 5000, 0, "vp", "dpm_solver_fast", 50, 1),
    "imagenet256_uvit_large": (300, 1024, 2e-4, (0.99, 0.99), 5000, 0.15, "vp", "dpm_solver_fast", 50, 1.4),
    "imagenet256_uvit_huge": (500, 1024, 2e-4, (0.99, 0.99), 5000, 0.1, "ldm", "dpmpp_fast", 50, 1.4),
    "imagenet512_uvit_large": (500, 1024, 2e-4, (0.99, 0.99), 5000, 0.15, "vp", "dpm_solver_fast", 50, 1.7),
    "imagenet512_uvit_huge": (500, 1024, 2e-4, (0.99, 0.99), 5000, 0.1, "ldm", "dpmpp_fast", 50, 1.7),
    "mscoco_uvit_small": (1000, 256, 2e-4, (0.9, 0.9), 5000, 0.1, "ldm", "dpmpp_fast", 50, 2),
    "mscoco_uvit_small_deep": (1000, 256, 2e-4, (0.9, 0.9), 5000, 0.1, "ldm", "dpmpp_fast", 50, 2),
}


@pytest.mark.parametrize("name", TABLE)
def test_recipes_equal_those_of_the_paper(name):
    config = load_config(CONFIGS / f"{name}.py")
    optim, train = config.optim, config.train
    found = (train.num_steps / 1000, train.batch_size, optim.lr, optim.betas, optim.warmup_steps, train.label_dropout)
    sampling = (config.sample.sampler, num_evaluations(config.process, config.sample), config.sample.guidance)
    assert (*found, config.process.schedule, *sampling) == TABLE[name]
    assert (optim.name, optim.weight_decay, optim.decay, optim.grad_clip) == ("adamw", 0.03, "constant", 0)
    assert (train.ema_decay, config.process.prediction) == (0.9999, "noise")
    assert (config.process.time_distribution, config.process.weighting) == ("uniform", "none")


# flips, autoencoder, scale factor
DATA = {
    "cifar10": (True, None, 0.18215),
    "celeba64": (True, None, 0.18215),
    "imagenet64": (True, None, 0.18215),
    "imagenet256_uvit_large": (True, SD_AUTOENCODER, 0.18215),
    "imagenet256_uvit_huge": (True, SD_AUTOENCODER_EMA, 0.18215),
    "imagenet512_uvit_large": (True, SD_AUTOENCODER, 0.18215),
    "imagenet512_uvit_huge": (True, SD_AUTOENCODER_EMA, 0.18215),
    "mscoco": (False, SD_AUTOENCODER, 0.2301),
}


@pytest.mark.parametrize("name", TABLE)
def test_data_settings_equal_those_of_the_paper(name):
    (expected,) = [row for start, row in DATA.items() if name.startswith(start)]
    data = load_config(CONFIGS / f"{name}.py").data
    assert (data.flip, data.autoencoder, data.scale_factor) == expected
    assert data.text_encoder == "openai/clip-vit-large-patch14"


@pytest.mark.parametrize("name", TABLE)
def test_models_have_the_published_parameters(name):
    with torch.device("meta"):
        model = UViT(load_config(CONFIGS / f"{name}.py").model)
    facts = FACTS["parameter_counts"][name]
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["parameters"]
    assert len(model.state_dict()) == facts["state_dict_entries"]


def test_configs_and_published_models_are_the_same():
    assert PUBLISHED_UVIT.keys() == TABLE.keys()
    assert all(load_config(CONFIGS / f"{name}.py").model == model for name, model in PUBLISHED.items())


def known_of(name):
    """What the tensors of a published model do not tell."""
    config = config_of(FACTS["parameter_counts"][name]["kwargs"])
    if not name.startswith("tiny"):
        return {}
    return {"num_heads": config.num_heads, "num_context_tokens": config.num_context_tokens}


@pytest.mark.parametrize("name", FACTS["parameter_counts"])
def test_sizes_are_inferred_from_the_tensors(name):
    config = config_of(FACTS["parameter_counts"][name]["kwargs"])
    with torch.device("meta"):
        weights = UViT(config).state_dict()
    inferred = infer_config(weights, **known_of(name))
    if config.num_classes == 1001:
        assert (inferred.num_classes, inferred.null_class) == (1000, True)
        inferred = infer_config(weights, null_class=False)
    assert inferred == config


def test_a_bottleneck_is_inferred_from_the_tensors():
    config = UViTConfig(**SIZES["small"], img_size=32, patch_size=8, patch_bottleneck=128)
    with torch.device("meta"):
        weights = UViT(config).state_dict()
    assert infer_config(weights) == config


def test_the_recipe_in_pixels_is_that_of_jit():
    """arXiv 2511.13720, JiT-B/16 on ImageNet 256x256 for 200 epochs; its time is 1 - t."""
    config = load_config(CONFIGS / "imagenet256_pixels.py")
    model, process, optim, train = config.model, config.process, config.optim, config.train
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (768, 12, 12, 16)
    assert (model.patch_bottleneck, model.in_chans * model.patch_size**2) == (128, 768)
    assert (process.prediction, process.loss_space, process.min_divisor) == ("data", "flow", 0.05)
    torch.manual_seed(0)
    logits = torch.logit(1 - sample_times(process, 20_000, torch.device("cpu")))
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.02) and logits.std().item() == pytest.approx(0.8, abs=0.02)
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw", 2e-4, (0.9, 0.95), 0)
    steps_per_epoch = 1_281_167 / train.batch_size
    assert (train.num_steps / steps_per_epoch, optim.warmup_steps / steps_per_epoch) == pytest.approx(
        (200, 5), rel=1e-3
    )
    assert (train.label_dropout, optim.decay) == (0.1, "constant")
    with torch.device("meta"):
        assert UViT(model).num_parameters == 100_953_044
