"""A small folder of latents, without an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.config import DataConfig
from uvit.data.manifest import Manifest, start_encoding, write_shard

MANIFEST = Manifest(
    source="made up",
    num_images=10,
    shard_size=4,
    image_shape=(8, 8),
    latent_shape=(2, 4, 4),
    autoencoder="vae",
    encoder_hash="abc",
    scale_factor=0.5,
    class_names=("a", "b"),
    text_encoder="clip",
    text_encoder_hash="def",
    num_captions=3,
    context_shape=(5, 6),
)


def latent_config(folder: Path, **fields: Any) -> DataConfig:
    """Returns the config that such latents fit, with other values of some fields."""
    return DataConfig(**{"name": str(folder), "autoencoder": "vae", "scale_factor": 0.5, **fields})


def latent_row(index: int) -> tuple[np.ndarray, int, list[str], np.ndarray]:
    """Returns a row whose every value tells its index: moments, label, captions, context."""
    moments = np.array([index, index + 0.5], np.float16)[:, None, None, None] + np.zeros((2, 4, 4, 4), np.float16)
    context = np.array([index, index + 0.25, index + 0.75], np.float16)[:, None, None] + np.zeros((3, 5, 6), np.float16)
    return moments, index % 2, [f"{index} {text}" for text in "xyz"], context


def write_latents(folder: Path) -> None:
    """Writes ten rows in three shards, of several record batches each."""
    start_encoding(folder, MANIFEST, torch.full((5, 6), -1.0))
    for shard in range(3):
        with write_shard(folder, MANIFEST, shard) as add:
            for part in (range(4 * shard, min(4 * shard + 3, 10)), range(4 * shard + 3, min(4 * shard + 4, 10))):
                if len(part):
                    moments, labels, captions, context = zip(*map(latent_row, part))
                    columns = {"moments": np.stack(moments), "label": np.array(labels)}
                    add({**columns, "captions": captions, "context": np.stack(context)})
