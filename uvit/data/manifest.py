"""The folder of latents that encode.py writes: a manifest and shards.

Shards are Arrow files that `datasets.Dataset.from_file` can open. A row has the moments of an image and of its mirror
image, its label, and for text models its captions and their features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from torch import Tensor

from uvit.common.errors import InputError
from uvit.common.files import atomic_write, refuse_folder
from uvit.config import MAX_SIDE, MAX_TOKENS, Section, from_dict, read_json, save_json
from uvit.networks.encoders import Autoencoder, TextEncoder
from uvit.weights.tensors import hash_weights

MANIFEST_FILE = "manifest.json"
EMPTY_CONTEXT_FILE = "empty_context.npy"
NAMES_ALONE = ("autoencoder", "text_encoder", "versions")
"""Fields of a manifest that may differ if the hashes agree."""
SHARD_FACTS = ("source", "fingerprint", "image_shape", "crop", "encoder_hash", "text_encoder_hash", "caption_column")
"""Fields of a manifest that are repeated in its shards, to detect shards of another encoding."""
FACT_PREFIX = b"uvit."
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of a complete stream; Arrow itself accepts one that was truncated between two messages."""
MAX_SHARDS = 100_000  # the five digits in their names
NUM_FLIPS = 2
"""Versions of an image: as it is, and mirrored."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Section):
    """What a folder of latents contains, and how they were made."""

    source: str
    """Data set and split."""
    fingerprint: str | None = None
    """Hash of the source's content, as `datasets` computes it; None for data without one."""
    num_images: int
    """Images in the source, including broken ones that were skipped."""
    shard_size: int
    """Images of the source in each shard but the last, including skipped ones."""
    image_shape: tuple[int, int]
    """(height, width) in pixels that images were cropped to."""
    latent_shape: tuple[int, int, int]
    """(C, h, w)."""
    crop: str = "center"
    """How images were cropped."""
    flips: int = NUM_FLIPS
    """Versions of each image: as it is, and mirrored."""
    autoencoder: str
    """Folder or hub name."""
    encoder_hash: str
    """The first 16 hexadecimal digits of the SHA-256 of the encoder's weights."""
    scale_factor: float
    """Factor to multiply latents by; the stored moments are unscaled."""
    class_names: tuple[str, ...] = ()
    """Names of the labels."""
    text_encoder: str | None = None
    """Folder or hub name."""
    text_encoder_hash: str | None = None
    """The first 16 hexadecimal digits of the SHA-256 of the text encoder's weights."""
    caption_column: str | None = None
    """Column of the data set that the captions were read from, if it has columns."""
    num_captions: int = 0
    """Captions per image."""
    context_shape: tuple[int, int] = (0, 0)
    """(tokens, width) of a caption's features."""
    versions: tuple[str, ...] = ()
    """Versions of the packages that made the latents, in the order of their first use."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "shard_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("image_shape", "latent_shape"):
            self._require(name, all(1 <= side <= MAX_SIDE for side in getattr(self, name)), f"1 to {MAX_SIDE:,} each")
        self._require(
            "context_shape", all(0 <= side <= MAX_TOKENS for side in self.context_shape), f"0 to {MAX_TOKENS:,} each"
        )
        self._require("flips", 1 <= self.flips <= NUM_FLIPS, f"1 to {NUM_FLIPS}")
        self._require("scale_factor", self.scale_factor > 0, "above 0")
        self._require("num_captions", 0 <= self.num_captions <= MAX_TOKENS, f"0 to {MAX_TOKENS:,}")
        if self.num_captions:
            self._require("context_shape", min(self.context_shape) >= 1, "positive where there are captions")
        if self.num_shards > MAX_SHARDS:
            raise InputError(
                f"num_images and shard_size must give at most {MAX_SHARDS:,} shards, got {self.num_shards:,}"
            )

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """(2C, h, w): mean and log-variance."""
        channels, height, width = self.latent_shape
        return 2 * channels, height, width

    def shard_file(self, shard: int) -> str:
        """Returns a shard's file name."""
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.arrow"

    def covered(self, shard: int) -> range:
        """Returns which images of the source a shard covers."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def features(self) -> datasets.Features:
        """Returns the columns of a shard."""
        half = datasets.Value("float16")
        columns: dict[str, Any] = {
            "moments": datasets.List(half, length=self.flips * math.prod(self.moments_shape)),
            "label": datasets.ClassLabel(names=list(self.class_names)) if self.class_names else datasets.Value("int64"),
        }
        if self.num_captions:
            columns["captions"] = datasets.List(datasets.Value("string"), length=self.num_captions)
            columns["context"] = datasets.List(half, length=self.num_captions * math.prod(self.context_shape))
        return datasets.Features(columns)

    def schema(self) -> pa.Schema:
        """Returns the Arrow schema of a shard; its metadata has the facts that tie it to the manifest."""
        schema = self.features().arrow_schema
        facts = {FACT_PREFIX + name.encode(): json.dumps(getattr(self, name)) for name in SHARD_FACTS}
        return schema.with_metadata({**schema.metadata, **facts})


def is_latent_data(name: str | Path) -> bool:
    """Returns whether a data set's name is a folder of latents."""
    return os.path.isfile(Path(name) / MANIFEST_FILE)


def is_complete(shard: Path) -> bool:
    """Returns whether a shard exists and was written to its end."""
    if not os.path.isfile(shard):
        return False
    with open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(END_OF_STREAM)))
        return file.read() == END_OF_STREAM


def read_manifest(folder: str | Path) -> Manifest:
    """Reads the manifest of a folder of latents.

    Raises:
        InputError: a missing or invalid manifest.
    """
    path = Path(folder) / MANIFEST_FILE
    return from_dict(Manifest, read_json(path), path)


@contextlib.contextmanager
def write_shard(folder: Path, manifest: Manifest, shard: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that adds rows, given as columns; the shard appears once the block has ended without an error.

    Raises:
        InputError: it cannot be written.
    """
    schema = manifest.schema()
    with (
        atomic_write(folder / manifest.shard_file(shard)) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_stream(file, schema) as stream,
    ):

        def add(rows: Mapping[str, Any]) -> None:
            columns = [_to_arrow(rows[field.name], field.type) for field in schema]
            stream.write_batch(pa.record_batch(columns, schema=schema))

        yield add


def _to_arrow(values: Any, kind: pa.DataType) -> pa.Array:
    """Converts a column: an array of numbers, whose rows are flattened, or a list of Python values."""
    if isinstance(values, np.ndarray) and pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    return pa.array(values, type=kind)


def check_same_encoding(folder: Path, manifest: Manifest) -> None:
    """Checks that a folder of latents to be continued was started with the same settings.

    Raises:
        InputError: different settings, with both values, or a folder where a shard would go.
    """
    for shard in range(manifest.num_shards):
        refuse_folder(folder / manifest.shard_file(shard))
    if is_latent_data(folder):
        before = read_manifest(folder)
        for field in dataclasses.fields(Manifest):
            was, now = getattr(before, field.name), getattr(manifest, field.name)
            if was != now and field.name not in NAMES_ALONE:
                raise InputError(f"{folder} was started with {field.name} {was!r}, got {now!r}: use another --output")


def start_encoding(folder: Path, manifest: Manifest, empty_context: Tensor | None) -> None:
    """Removes what an interrupted process left half-written, and writes the manifest.

    An existing manifest is kept; only the versions of the packages in use now are added.

    Args:
        folder: the folder of latents, checked by check_same_encoding.
        manifest: what it will contain.
        empty_context: (tokens, width) features of the empty caption, for latents with captions.

    Raises:
        InputError: it cannot be written.
    """
    for leftover in folder.glob(".shard-*"):
        leftover.unlink(missing_ok=True)
    if empty_context is not None:
        with atomic_write(folder / EMPTY_CONTEXT_FILE) as temporary:
            np.save(temporary, empty_context.half().cpu().numpy(), allow_pickle=False)
    if is_latent_data(folder):
        before = read_manifest(folder)
        versions = tuple(dict.fromkeys(before.versions + manifest.versions))
        manifest = dataclasses.replace(before, versions=versions)
    save_json(folder / MANIFEST_FILE, manifest)


def hash_autoencoder(autoencoder: Autoencoder) -> str:
    """Returns the hash by which a manifest knows an autoencoder: that of its encoder."""
    return hash_weights(autoencoder.encoder_state_dict())


def hash_text_encoder(text_encoder: TextEncoder) -> str:
    """Returns the hash by which a manifest knows a text encoder."""
    return hash_weights(text_encoder.network.state_dict())
