from __future__ import annotations

import pytest
import torch

from uvit import Config, UViT, UViTConfig
from uvit.config import SampleConfig
from uvit.sampling.generate import (
    MIN_DEFAULT_BATCH,
    default_batch_size,
    describe_guidance,
    generate,
    generate_batches,
    sample_grid,
)

CPU = torch.device("cpu")
MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3, null_class=True)
CONFIG = Config(model=MODEL, sample=SampleConfig(num_steps=2, guidance=1.5))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = UViT(MODEL)
    torch.nn.init.normal_(model.decoder_pred.weight, std=0.3)
    return model.eval()


def assert_equal_to_rounding(images, expected):
    assert images.shape == expected.shape and images.dtype == torch.uint8
    assert (images.int() - expected.int()).abs().max() <= 1


def test_an_image_depends_only_on_seed_condition_and_number(network):
    conditions = [0, 1, 1, 2, 0]
    images = generate(network, CONFIG, conditions, seed=5)
    assert images.shape == (5, 1, 8, 8) and images.float().std() > 10
    assert_equal_to_rounding(generate(network, CONFIG, conditions, seed=5, batch_size=2), images)
    other_order = generate(network, CONFIG, [1, 0, 2, 1, 0], seed=5)
    assert_equal_to_rounding(other_order[[1, 0, 3, 2, 4]], images)
    assert_equal_to_rounding(generate(network, CONFIG, [1, 1], seed=5), images[1:3])
    assert (images[1].int() - images[2].int()).abs().max() > 1  # the second of its class
    assert (generate(network, CONFIG, conditions, seed=6).int() - images.int()).abs().max() > 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_images(network, processes):
    conditions = [0, 1, 1, 2, 0]
    images = generate(network, CONFIG, conditions, seed=5)
    for process in range(processes):
        batches = generate_batches(network, CONFIG, conditions, 5, batch_size=1, share=(process, processes))
        assert_equal_to_rounding(torch.cat([*batches]), images[process::processes])


def test_on_evaluation_is_called_for_every_evaluation(network):
    seen = []
    generate(network, CONFIG, [0, 1, 2], seed=0, batch_size=2, on_evaluation=lambda x: seen.append(len(x)))
    assert seen == [2, 2, 1, 1]


def test_the_default_batch_fits_the_cache_of_a_processor_and_is_at_least_four():
    sizes = [default_batch_size(Config(model=UViTConfig(img_size=size)), CPU) for size in (8, 16, 64)]
    assert sizes == [30, 7, MIN_DEFAULT_BATCH]
    tokens = MODEL.num_tokens * MODEL.embed_dim * 4
    assert default_batch_size(CONFIG, CPU) == 2**20 // (2 * tokens)  # guidance predicts each image twice


def test_guidance_is_described_in_both_conventions():
    config = Config()
    assert describe_guidance(1.4, config) == "guidance w = 1.4 (the paper's s = 0.4)"
    assert describe_guidance(1, config) == "guidance w = 1 (the paper's s = 0)"
    assert describe_guidance(2, config, "runs/bad") == "guidance w = 2 (the paper's s = 1) away from runs/bad"


def test_a_grid_has_a_named_row_for_each_condition():
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    named = sample_grid(images, [0, 1], 3, CONFIG)
    plain = sample_grid(images, [None], 3, Config())
    assert named.size[1] == 2 + 2 * 66 and named.size[0] > 3 * 66
    assert plain.size == (2 + 8 * 66, 2 + 66)  # without names, rows of eight
