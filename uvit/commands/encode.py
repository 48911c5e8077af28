"""Encodes images and captions once, before training: `python encode.py --data photos --output data/photos`.

`accelerate launch encode.py …` splits the work between processes. Running the same command again resumes it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from tqdm import tqdm

from uvit import __version__
from uvit.common.cli import parse, process_state
from uvit.common.errors import InputError
from uvit.common.libraries import installed_versions
from uvit.config import CONFIG_FILE, MAX_BATCH, MAX_SIDE, MAX_WORKERS, DataConfig, Section
from uvit.data.batch import Batch, ImageData, ImageSpec
from uvit.data.datasets import HubData, load_images
from uvit.data.images import to_unit_range
from uvit.data.loader import read_in_parts
from uvit.data.manifest import (
    Manifest,
    check_same_encoding,
    hash_autoencoder,
    hash_text_encoder,
    is_complete,
    start_encoding,
    write_shard,
)
from uvit.data.skipped import describe_skipped, report_skipped
from uvit.networks.encoders import EMPTY_CAPTION, Autoencoder, TextEncoder
from uvit.weights.published import SD_AUTOENCODER

LATENTS_DEPEND_ON = ("torch", "diffusers", "transformers", "datasets")


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    data: str
    """`photos`, a folder on disk or a hub name, as for training."""
    output: str
    """Folder for the latents."""
    split: str = "train"
    """Split to encode."""
    image_size: int = 256
    """Side in pixels that images are cropped to."""
    autoencoder: str = SD_AUTOENCODER
    """Frozen AutoencoderKL: a folder or a hub name."""
    scale_factor: float = DataConfig.scale_factor
    """Factor that training will multiply the latents by."""
    text_encoder: str | None = None
    """Frozen CLIP text encoder for the captions, a folder or a hub name; None encodes no captions."""
    label_column: str | None = None
    """Column of labels, where the data has several."""
    caption_column: str | None = None
    """Column of captions; None is the only text column, or one with a usual name."""
    num_captions: int = 1
    """Captions to keep per image (COCO has five); an image with fewer repeats them."""
    on_error: Literal["stop", "skip"] = "stop"
    """When an image cannot be read: stop, or skip it and list it."""
    batch_size: int = 16
    """Images at a time, per process."""
    shard_size: int = 2048
    """Images per file: the most that an interruption can lose in each process."""
    num_workers: int = 0
    """Loader processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "num_captions", "batch_size", "shard_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require_at_most(image_size=MAX_SIDE, num_workers=MAX_WORKERS, batch_size=MAX_BATCH)
        self._require("scale_factor", self.scale_factor > 0, "above 0")
        if self.text_encoder is None:
            self._require("caption_column", self.caption_column is None, "None without text_encoder")
            self._require("num_captions", self.num_captions == 1, "1 without text_encoder")


def check_output(folder: Path, data: str) -> None:
    """Checks that latents would be mixed with nothing else.

    Raises:
        InputError: the folder is that of the images, or holds a run or a network.
    """
    if folder.resolve() == Path(data).resolve():
        raise InputError(f"--output must be another folder than that of the images, got {folder}")
    if (folder / CONFIG_FILE).is_file():
        raise InputError(f"--output must be a new folder or one of latents, got {folder}, which has a {CONFIG_FILE}")


def build_manifest(
    given: Arguments, data: ImageData, autoencoder: Autoencoder, text_encoder: TextEncoder | None
) -> Manifest:
    """Describes the latents that will be made.

    Raises:
        InputError: an image size that the autoencoder's downsampling does not divide.
    """
    side = given.image_size // autoencoder.factor
    if given.image_size % autoencoder.factor:
        raise InputError(f"image_size must be divisible by {autoencoder.factor}, got {given.image_size}")
    return Manifest(
        source=f"{os.path.normpath(given.data)}, {given.split}",
        fingerprint=data.fingerprint if isinstance(data, HubData) else None,
        num_images=len(data),
        shard_size=given.shard_size,
        image_shape=(given.image_size, given.image_size),
        latent_shape=(autoencoder.latent_channels, side, side),
        autoencoder=given.autoencoder,
        encoder_hash=hash_autoencoder(autoencoder),
        scale_factor=given.scale_factor,
        class_names=data.class_names,
        text_encoder=given.text_encoder,
        text_encoder_hash=hash_text_encoder(text_encoder) if text_encoder else None,
        caption_column=data.caption_column if isinstance(data, HubData) else None,
        num_captions=given.num_captions if text_encoder else 0,
        context_shape=text_encoder.context_shape if text_encoder else (0, 0),
        versions=(f"uvit {__version__}", *installed_versions(LATENTS_DEPEND_ON)),
    )


def encode_batch(
    batch: Batch, manifest: Manifest, autoencoder: Autoencoder, text_encoder: TextEncoder | None
) -> dict[str, Any]:
    """Returns the columns of a shard for a batch of images.

    Raises:
        InputError: moments that float16 cannot hold.
    """
    images = to_unit_range(batch.images)
    both = torch.stack([autoencoder.encode(images), autoencoder.encode(images.flip(-1))], dim=1)  # (B, 2, 2C, h, w)
    moments = both.half()
    if not moments.isfinite().all():
        raise InputError(f"autoencoder {manifest.autoencoder!r} gives moments that float16 cannot hold, such as NaN")
    rows: dict[str, Any] = {"moments": moments.cpu().numpy(), "label": batch.labels.cpu().numpy()}
    if text_encoder is not None:
        captions = [[texts[n % len(texts)] for n in range(manifest.num_captions)] for texts in batch.captions]
        context = text_encoder([text for texts in captions for text in texts])  # (B · captions, tokens, width)
        rows |= {"captions": captions, "context": context.half().cpu().numpy()}
    return rows


def encode(
    given: Arguments,
    data: ImageData,
    manifest: Manifest,
    autoencoder: Autoencoder,
    text_encoder: TextEncoder | None,
    state: PartialState,
) -> None:
    """Encodes this process's share of the missing shards."""
    folder = Path(given.output)
    missing = [shard for shard in range(manifest.num_shards) if not is_complete(folder / manifest.shard_file(shard))]
    state.wait_for_everyone()  # all processes list the missing shards before any writes one
    parts: dict[int, list[range]] = {}
    for shard in missing[state.process_index :: state.num_processes]:
        covered = manifest.covered(shard)
        parts[shard] = [covered[first : first + given.batch_size] for first in range(0, len(covered), given.batch_size)]

    order = [part for shard_parts in parts.values() for part in shard_parts]
    batches = read_in_parts(data, order, given.num_workers)
    total = sum(map(len, order))
    with tqdm(total=total, unit="image", disable=not state.is_main_process, dynamic_ncols=True) as progress:
        for shard, shard_parts in parts.items():
            with write_shard(folder, manifest, shard) as add:
                for part in shard_parts:
                    batch = next(batches)
                    report_skipped(folder, batch.skipped)
                    if len(batch.labels):
                        add(encode_batch(batch.to(state.device), manifest, autoencoder, text_encoder))
                    progress.update(len(part))


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, prepares the folder and encodes."""
    given = parse(Arguments, arguments, __doc__)
    source = DataConfig(
        name=given.data,
        train_split=given.split,
        label_column=given.label_column,
        caption_column=given.caption_column,
        on_error=given.on_error,
    )
    check_output(Path(given.output), given.data)
    text = given.text_encoder is not None
    data = load_images(source, ImageSpec((3, given.image_size, given.image_size), labels=None, captions=text))
    autoencoder = Autoencoder(given.autoencoder, given.scale_factor)
    text_encoder = TextEncoder(given.text_encoder) if given.text_encoder else None
    manifest, folder = build_manifest(given, data, autoencoder, text_encoder), Path(given.output)
    check_same_encoding(folder, manifest)

    state = process_state()
    autoencoder.to(state.device)
    if text_encoder is not None:
        text_encoder.to(state.device)
    if state.is_main_process:
        start_encoding(folder, manifest, text_encoder([EMPTY_CAPTION])[0] if text_encoder else None)
    state.wait_for_everyone()
    encode(given, data, manifest, autoencoder, text_encoder, state)
    state.wait_for_everyone()
    if state.is_main_process:
        made = f"{manifest.num_images} images of {manifest.source} in {manifest.num_shards} shards in {folder}"
        print(made + describe_skipped(folder))
