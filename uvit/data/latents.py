"""Latents as training data, read from the shards that encode.py writes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from uvit.common.errors import InputError, printable
from uvit.config import DataConfig, NetworkConfig
from uvit.data.batch import MIN_IMAGES, Batch
from uvit.data.manifest import (
    EMPTY_CONTEXT_FILE,
    FACT_PREFIX,
    Manifest,
    hash_autoencoder,
    hash_text_encoder,
    is_complete,
    read_manifest,
)
from uvit.networks.encoders import Encoders


@dataclass(frozen=True)
class _Rows:
    """A column of fixed-size rows over many Arrow files, read by position.

    Rows are read, not memory-mapped, so that the process does not grow with a data set larger than memory.
    """

    files: Sequence[Path]
    file_of: np.ndarray
    """File of each chunk."""
    starts: np.ndarray
    """First row of each chunk."""
    offsets: np.ndarray
    """Bytes before each chunk in its file."""
    width: int
    """float16 values of a row."""

    def read_part(self, index: int, part: int, num_parts: int) -> np.ndarray:
        """Reads one of the equal parts of a row."""
        chunk = int(np.searchsorted(self.starts, index, side="right")) - 1
        values = self.width // num_parts
        bytes_before = ((index - int(self.starts[chunk])) * self.width + part * values) * 2
        with open(self.files[self.file_of[chunk]], "rb", buffering=0) as file:
            read = os.pread(file.fileno(), values * 2, int(self.offsets[chunk]) + bytes_before)
        if len(read) != values * 2:
            raise InputError(f"{file.name} was cut while it was in use: run the same encode.py command again")
        return np.frombuffer(read, np.float16)


@dataclass(frozen=True)
class LatentData:
    """A data set of latents: their moments, labels, and captions with their features."""

    manifest: Manifest
    flip: bool
    moments: _Rows
    labels: np.ndarray
    context: _Rows | None
    captions: pa.ChunkedArray | None
    empty_context: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.manifest.latent_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        manifest = self.manifest
        flips = rng.integers(manifest.flips if self.flip else 1, size=len(indices))
        pairs = zip(indices, flips.tolist())
        moments = np.stack([self.moments.read_part(index, flip, manifest.flips) for index, flip in pairs])
        batch = Batch(
            torch.from_numpy(moments).unflatten(1, manifest.moments_shape),
            torch.from_numpy(self.labels[list(indices)]),
            [],
        )
        if self.context is None or self.captions is None:
            return batch
        chosen = list(zip(indices, rng.integers(manifest.num_captions, size=len(indices)).tolist()))
        context = np.stack([self.context.read_part(index, text, manifest.num_captions) for index, text in chosen])
        return batch._replace(
            captions=[[self.captions[index].as_py()[text]] for index, text in chosen],
            context=torch.from_numpy(context).unflatten(1, manifest.context_shape),
            empty_context=self.empty_context,
        )


def load_latents(config: DataConfig, model: NetworkConfig) -> LatentData:
    """Loads latents for a model.

    Args:
        config: the folder, and how its latents should have been made.
        model: the shape of latents and context, and whether captions are needed.

    Raises:
        InputError: missing or broken shards, or latents that do not fit, with both values.
    """
    folder, manifest = Path(config.name), read_manifest(config.name)
    _check_fit(config, model, manifest)
    files = [folder / manifest.shard_file(shard) for shard in range(manifest.num_shards)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(
            f"data {config.name!r} has {len(files) - len(missing)} of {len(files)} shards, {missing[0]} is not there: "
            "run the same encode.py command again"
        )
    text, schema = model.context_dim > 0, manifest.schema()
    moments, labels = _Chunks(), []
    context, captions = _Chunks(), []
    for number, file in enumerate(files):
        try:
            with pa.memory_map(str(file)) as mapped:
                start = mapped.read_buffer().address
                mapped.seek(0)
                if not is_complete(file):
                    raise pa.ArrowInvalid("no end of stream")
                stream = pa.ipc.open_stream(mapped)
                _check_columns(file, stream.schema, schema)
                count = 0
                for batch in stream:
                    count += len(batch)
                    moments.add(number, batch.column("moments"), start)
                    labels.append(batch.column("label").to_numpy())
                    if text:
                        context.add(number, batch.column("context"), start)
                        captions.append(batch.column("captions"))
        except (pa.ArrowException, KeyError, OSError) as error:
            raise InputError(f"{file} is not a complete shard of latents ({type(error).__name__})") from None
        if count > len(manifest.covered(number)):
            raise InputError(f"{file} must have {len(manifest.covered(number))} rows at most, got {count}")
    if sum(map(len, labels)) < MIN_IMAGES:
        raise InputError(f"data {config.name!r} must have {MIN_IMAGES} images or more, got {sum(map(len, labels))}")
    return LatentData(
        manifest,
        config.flip,
        moments.rows(files, manifest.flips * math.prod(manifest.moments_shape)),
        np.concatenate(labels),
        context.rows(files, manifest.num_captions * math.prod(manifest.context_shape)) if text else None,
        pa.chunked_array(captions) if text else None,
        _read_empty_context(folder / EMPTY_CONTEXT_FILE, manifest.context_shape) if text else None,
    )


def _check_columns(file: Path, found: pa.Schema, expected: pa.Schema) -> None:
    """Checks a shard's columns and metadata against the manifest."""
    for name in expected.names:
        kind = found.field(name).type if name in found.names else None
        if kind != expected.field(name).type:
            raise InputError(f"{file} must have {name} of type {expected.field(name).type}, got {kind}")
    for name, value in expected.metadata.items():
        made_with = (found.metadata or {}).get(name)
        if name.startswith(FACT_PREFIX) and made_with != value:
            was = "none" if made_with is None else printable(made_with.decode(errors="replace"))
            fact = name.removeprefix(FACT_PREFIX).decode()
            raise InputError(f"{file} is of another encoding: {fact} must be {value.decode()}, got {was}")


def _read_empty_context(path: Path, shape: tuple[int, int]) -> Tensor:
    """Returns the (1, tokens, width) features of the empty caption."""
    try:
        context = np.load(path, allow_pickle=False)
    except Exception as error:  # a broken file may raise any type
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): run the same encode.py command again"
        ) from None
    if not isinstance(context, np.ndarray) or context.shape != shape or context.dtype != np.float16:
        found = f"{context.shape} {context.dtype}" if isinstance(context, np.ndarray) else type(context).__name__
        raise InputError(f"{path} must hold float16 numbers of shape {shape}, got {found}")
    return torch.from_numpy(context)[None]


class _Chunks:
    """Collects the positions of a column's chunks in files."""

    def __init__(self) -> None:
        self.files: list[int] = []
        self.lengths: list[int] = []
        self.offsets: list[int] = []

    def add(self, file: int, column: pa.FixedSizeListArray, start: int) -> None:
        """Adds a chunk of a file that is memory-mapped at address `start`."""
        self.files.append(file)
        self.lengths.append(len(column))
        self.offsets.append(column.flatten().buffers()[1].address - start)

    def rows(self, files: Sequence[Path], width: int) -> _Rows:
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        return _Rows(files, np.array(self.files), starts, np.array(self.offsets), width)


def _check_fit(config: DataConfig, model: NetworkConfig, manifest: Manifest) -> None:
    """Checks that the latents are what the config asks for."""
    latent_shape = (model.in_chans, *model.image_shape)
    expected: dict[str, tuple[object, object]] = {
        "shape of latents (model.in_chans, model.img_size)": (manifest.latent_shape, latent_shape),
        "data.scale_factor": (manifest.scale_factor, config.scale_factor),
        "data.crop": (manifest.crop, config.crop),
    }
    if model.context_dim:
        context_shape = (model.num_context_tokens, model.context_dim)
        shape = "shape of context (model.num_context_tokens, model.context_dim)"
        expected[shape] = (manifest.context_shape, context_shape)
    for name, (found, given) in expected.items():
        if found != given:
            raise InputError(f"data {config.name!r} was encoded with {name} {found}, got {given}")
    if config.flip and manifest.flips == 1:
        raise InputError(f"data {config.name!r} was encoded without mirror images, got data.flip True")
    if config.autoencoder is None:
        made = f"latents of autoencoder {manifest.autoencoder!r}"
        raise InputError(f"data {config.name!r} has {made}, got data.autoencoder None")


def check_encoded_by(data: object, config: DataConfig, encoders: Encoders) -> None:
    """Checks that latents were made by the run's encoders; data of another kind passes.

    Raises:
        InputError: another autoencoder or text encoder, with both names and hashes.
    """
    if not isinstance(data, LatentData):
        return
    manifest = data.manifest
    if encoders.image is not None:
        made_by, hashes = (
            manifest.autoencoder,
            (manifest.encoder_hash, hash_autoencoder(encoders.image)),
        )
        _check_hash(f"data {config.name!r} was encoded by autoencoder", made_by, config.autoencoder, *hashes)
    if encoders.text is not None:
        made_by = str(manifest.text_encoder)
        hashes = str(manifest.text_encoder_hash), hash_text_encoder(encoders.text)
        _check_hash(f"data {config.name!r} was encoded by text encoder", made_by, config.text_encoder, *hashes)


def _check_hash(what: str, made_by: str, given: str | None, made_hash: str, given_hash: str) -> None:
    if made_hash != given_hash:
        raise InputError(f"{what} {made_by!r} (weights {made_hash}), got {given!r} (weights {given_hash})")
