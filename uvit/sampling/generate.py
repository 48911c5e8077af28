"""Conditions to images, for the grids of training, sample.py, evaluate.py and the web page alike."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from uvit.config import Config
from uvit.data.images import to_uint8
from uvit.diffusion.reuse import reuse_deep_features
from uvit.diffusion.samplers import ImageNoise, Predict, sample
from uvit.networks.contract import Network
from uvit.networks.encoders import NO_ENCODERS, Encoders
from uvit.networks.runtime import resolve_precision, tf32
from uvit.sampling.conditions import Condition, batch_conditions, condition_names, guidance_condition
from uvit.sampling.grid import image_grid

CPU_CACHE_BYTES = 2**20  # larger batches are slower: benchmarks/sample.py
MIN_DEFAULT_BATCH = 4  # smaller batches read (and in bf16 round) the weights of a large model too often
MAX_DEFAULT_BATCH = 512

UNLABELLED_COLUMNS = 8
"""Images per row where there are no conditions."""


def default_batch_size(config: Config, device: torch.device) -> int:
    """Returns how many images to draw at a time: one layer of them fits a CPU's cache, or all layers a GPU's memory."""
    model = config.model
    passes = 1 if config.sample.guidance == 1 or model.takes_guidance else 2
    image_bytes = passes * model.activation_size * torch.float32.itemsize
    if device.type != "cuda":
        return max(MIN_DEFAULT_BATCH, CPU_CACHE_BYTES // image_bytes)
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MAX_DEFAULT_BATCH, free // 2 // (image_bytes * model.live_activations)))


def decode_images(x: Tensor, encoders: Encoders) -> Tensor:
    """Converts what a model draws, pixels in [-1, 1] or latents, to images: (B, C, H, W) uint8."""
    return to_uint8(x if encoders.image is None else encoders.image.decode(x))


def generate_batches(
    model: Network,
    config: Config,
    conditions: Sequence[Condition],
    seed: int,
    batch_size: int | None = None,
    encoders: Encoders = NO_ENCODERS,
    on_evaluation: Callable[[Tensor], object] | None = None,
    share: tuple[int, int] = (0, 1),
    weak: Predict | None = None,
) -> Iterator[Tensor]:
    """Draws one image for each condition, a batch at a time.

    The k-th image of a condition depends only on (seed, condition, k): not on the batch size, the device, the other
    conditions or the number of processes.

    Args:
        model: the network, in eval mode.
        config: what it was trained on, and the solver, steps and guidance to draw with.
        conditions: a label, a prompt or None for each image, whichever the model takes.
        seed: seed of the set.
        batch_size: images at a time; None is default_batch_size.
        encoders: the run's text encoder, if the model takes a context, and its autoencoder, if it draws latents.
        on_evaluation: called with a batch's x_t after each evaluation of the network, for a progress bar;
            `decode_images` converts it to images.
        share: (process, number of processes); of N processes, each draws every N-th image.
        weak: a worse network, in eval mode and on the same device, which guidance leads away from instead of the empty
            condition: it is called as the model is, with the same condition, and reuses no deep features.

    Yields:
        (B, C, H, W) uint8 on the device of the model.
    """
    device = next(model.parameters()).device
    shape = (config.model.in_chans, *config.model.image_shape)
    drawn: dict[Condition, int] = {}
    items = []
    for condition in conditions:
        number = zlib.crc32(condition.encode()) if isinstance(condition, str) else condition or 0
        items.append(((seed, number, drawn.setdefault(condition, 0)), condition))
        drawn[condition] += 1

    own_items = items[share[0] :: share[1]]
    batch_size = batch_size or default_batch_size(config, device)
    precision = resolve_precision(config.sample.mixed_precision, device.type, config.model.width)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for start in range(0, len(own_items), batch_size):
        keys, part = zip(*own_items[start : start + batch_size])
        cond, uncond = batch_conditions(part, config.model, encoders.text, device)
        cond = {**cond, **guidance_condition(config.model, config.sample, len(part), device)}
        worse = weak
        if weak is not None:
            uncond = cond
        elif config.sample.guidance_path:
            worse, uncond = model.forward_outer, uncond or cond
        reused = config.sample.reused
        network = model if reused is None else reuse_deep_features(model.forward_reusing, *reused)
        noise = ImageNoise(keys, shape, device)
        with tf32(), torch.autocast(device.type, dtype, enabled=precision != "no"):
            x = sample(network, config.process, config.sample, noise, cond, uncond, on_evaluation, worse)
        yield decode_images(x, encoders)


def generate(
    model: Network,
    config: Config,
    conditions: Sequence[Condition],
    seed: int,
    batch_size: int | None = None,
    encoders: Encoders = NO_ENCODERS,
    on_evaluation: Callable[[Tensor], object] | None = None,
    weak: Predict | None = None,
) -> Tensor:
    """Draws images as `generate_batches` does, with the same arguments, and returns them all: (N, C, H, W) uint8."""
    batches = generate_batches(model, config, conditions, seed, batch_size, encoders, on_evaluation, weak=weak)
    return torch.cat([images.cpu() for images in batches])


def sample_grid(images: Tensor, rows: Sequence[Condition], columns: int, config: Config) -> Image.Image:
    """Arranges images in one picture: a named row for each condition, or plain rows where there are none."""
    return image_grid(images, UNLABELLED_COLUMNS if rows == [None] else columns, condition_names(rows, config))


def describe_guidance(scale: float, config: Config, away_from: str | None = None) -> str:
    """Describes a guidance scale in both conventions, ours and the paper's.

    Args:
        scale: w.
        config: of the run that is drawn from.
        away_from: name of another network that it leads away from; None is the empty condition, or the outer blocks.
    """
    if config.sample.guidance_path and scale != 1:
        away_from = away_from or "the outer blocks alone"
    details = f"the paper's s = {scale - 1:g}{', in one pass' if config.model.takes_guidance else ''}"
    return f"guidance w = {scale:g} ({details})" + (f" away from {away_from}" if away_from else "")
