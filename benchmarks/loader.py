"""Is the loader ever the bottleneck? `python benchmarks/loader.py`

Measures items per second of one loader process, on one thread: latents of a set far larger than memory, images beside
what the decoder alone does, and the training steps that would use them. Writes benchmarks/results/loader.json.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import sklearn.datasets
import torch
from measure import save_result
from PIL import Image

from uvit import UViT
from uvit.common.cli import parse, run
from uvit.config import Config, DataConfig, TrainConfig, UViTConfig
from uvit.data.loader import build_loader, load_data
from uvit.data.manifest import Manifest, start_encoding, write_shard
from uvit.diffusion.objective import diffusion_loss
from uvit.weights.published import SIZES

LATENT_SHAPE = (4, 32, 32)
SHARD_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Arguments:
    gigabytes: float = 40.0
    """Size of the set of latents, made of one shard under many names."""
    seconds: float = 5.0
    """Time for each figure; the median of five parts of it is taken."""
    folder: str | None = None
    """Where the data goes; None is a temporary folder."""


def rate(work: Callable[[], int], seconds: float) -> float:
    """Returns what `work` gets done per second, the median of five parts of the time."""
    work()
    rates = []
    for _ in range(5):
        done, started = 0, time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds / 5:
            done += work()
        rates.append(done / taken)
    return statistics.median(rates)


def make_latents(folder: Path, gigabytes: float) -> int:
    """Writes one shard of random moments, links it under as many names as the size asks for; returns the bytes."""
    manifest = Manifest(
        source="random",
        num_images=SHARD_SIZE,
        shard_size=SHARD_SIZE,
        image_shape=(256, 256),
        latent_shape=LATENT_SHAPE,
        autoencoder="none",
        encoder_hash="",
        scale_factor=DataConfig.scale_factor,
    )
    folder.mkdir()
    shape = (SHARD_SIZE, manifest.flips, *manifest.moments_shape)
    moments = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16)
    with write_shard(folder, manifest, 0) as add:
        add({"moments": moments, "label": np.zeros(SHARD_SIZE, np.int64)})
    first = folder / manifest.shard_file(0)
    size = first.stat().st_size
    count = max(1, round(gigabytes * 2**30 / size))
    manifest = replace(manifest, num_images=count * SHARD_SIZE)
    first = first.rename(folder / manifest.shard_file(0))
    for shard in range(1, count):
        os.link(first, folder / manifest.shard_file(shard))
    start_encoding(folder, manifest, None)
    return count * size


def make_photos(folder: Path, copies: int = 32) -> None:
    """Copies scikit-learn's two photographs, camera JPEGs of 640x427 and about 170 KB."""
    folder.mkdir()
    for photo in (Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"):
        for number in range(copies):
            shutil.copy(photo, folder / f"{photo.stem}_{number}.jpg")


def loader_rate(config: Config, seconds: float) -> float:
    """Items per second of one loader in this process."""
    data = load_data(config.data, config.model)
    batches = iter(build_loader(data, config, start_step=0, rank=0, world_size=1, pin_memory=False))
    return rate(lambda: len(next(batches).labels), seconds)


def decoder_rate(folder: Path, seconds: float) -> float:
    """Images per second that Pillow alone decodes to RGB, in the order of the loader."""
    files = [file.read_bytes() for file in sorted(folder.iterdir())]

    def work() -> int:
        for content in files:
            Image.open(io.BytesIO(content)).convert("RGB")
        return len(files)

    return rate(work, seconds)


def training_rate(model: UViTConfig, batch_size: int, seconds: float) -> float:
    """Images per second of forward and backward on this device, with data that is there already."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network = UViT(model).to(device)
    x = torch.randn(batch_size, model.in_chans, *model.image_shape, device=device)

    def work() -> int:
        diffusion_loss(network, x, Config().process).backward()
        network.zero_grad()
        return batch_size

    return rate(work, seconds)


def resident() -> float:
    """GiB of memory that this process holds now, mapped files included."""
    return psutil.Process().memory_info().rss / 2**30


def main(arguments: list[str]) -> None:
    """Measures and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    torch.set_num_threads(1)
    small = UViTConfig(**SIZES["small"], img_size=32, patch_size=2)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        size = make_latents(Path(folder, "latents"), given.gigabytes)
        make_photos(Path(folder, "photos"))
        of_latents = Config(
            model=replace(small, in_chans=LATENT_SHAPE[0]),
            data=DataConfig(name=f"{folder}/latents", autoencoder="none", flip=True),
            train=TrainConfig(batch_size=256),
        )
        of_images = Config(
            model=UViTConfig(img_size=256, patch_size=16),
            data=DataConfig(name=f"{folder}/photos"),
            train=TrainConfig(batch_size=64),
        )
        before = resident()
        latents = loader_rate(of_latents, given.seconds)
        after = resident()
        decoder = decoder_rate(Path(folder, "photos"), given.seconds)
        images = loader_rate(of_images, given.seconds)
    training = training_rate(small, 8, 2 * given.seconds)
    figures = {
        "latents_per_second": latents,
        "latents_gib": size / 2**30,
        "resident_gib": after,
        "resident_before_gib": before,
        "jpegs_per_second": images,
        "jpegs_decoded_alone_per_second": decoder,
        "trained_s2_images_per_second": training,
    }
    save_result("loader", figures)
    print("| one process, one thread | per second\n|---|---|")
    print(f"| latents 4x32x32, of {size / 2**30:.0f} GiB | {latents:,.0f} |")
    print(f"| JPEG 640x427 to 256x256 | {images:.0f} |")
    print(f"| the same, decoded by Pillow alone | {decoder:.0f}, of which the loader reaches {images / decoder:.0%} |")
    print(f"| training U-ViT-S/2 on 257 tokens, here | {training:.1f} |")
    print(f"resident memory {after:.2f} GiB, before the latents were read {before:.2f} GiB")


if __name__ == "__main__":
    run(main)
