"""Data sets of latents, as encode.py makes them.

A folder holds `manifest.json` and shards, Arrow files that `datasets.Dataset.from_file` opens. A row has the moments of
an image and of its mirror image, its label, and for text models its captions and their features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from uvit.config import MAX_SIDE, MAX_TOKENS, DataConfig, Section, UViTConfig, from_dict, read_json, to_json
from uvit.data import MIN_IMAGES, Batch
from uvit.errors import InputError, printable
from uvit.files import write_aside, write_text
from uvit.latents import Encoders

MANIFEST_FILE = "manifest.json"
EMPTY_CONTEXT_FILE = "empty_context.npy"
NAMES_ALONE = ("autoencoder", "text_encoder", "versions")
"""Fields of a manifest that may differ while the hashes agree."""
SHARD_FACTS = ("source", "fingerprint", "image_shape", "crop", "encoder_hash", "text_encoder_hash", "caption_column")
"""Fields of a manifest that its shards repeat: by them a shard of another encoding is known."""
FACT_PREFIX = b"uvit."
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Arrow's last bytes: it takes a stream that was cut between two messages for a whole one."""
MAX_SHARDS = 100_000  # as many as their names have digits for
NUM_FLIPS = 2
"""Versions of an image: as it is, and mirrored."""


@dataclass(frozen=True, kw_only=True)
class Manifest(Section):
    """What the latents of a folder are, and how they were made."""

    source: str
    """Data set and split."""
    fingerprint: str | None = None
    """What `datasets` knows the source's content by; None of data without one."""
    num_images: int
    """Images of the source, those left out as broken included."""
    shard_size: int
    """Images of the source that each shard but the last covers."""
    image_shape: tuple[int, int]
    """(height, width) in pixels, to which images were cut."""
    latent_shape: tuple[int, int, int]
    """(C, h, w)."""
    crop: str = "center"
    """How images were cut."""
    flips: int = NUM_FLIPS
    """Versions of each image: as it is, and mirrored."""
    autoencoder: str
    """Folder or hub name."""
    encoder_hash: str
    """SHA-256 of the encoder's weights, its first 16 letters."""
    scale_factor: float
    """What latents are to be multiplied by; the moments are not."""
    class_names: tuple[str, ...] = ()
    """Names of the labels."""
    text_encoder: str | None = None
    """Folder or hub name."""
    text_encoder_hash: str | None = None
    """SHA-256 of the text encoder's weights, its first 16 letters."""
    caption_column: str | None = None
    """Column of the data set that the captions were read from, where it has columns."""
    num_captions: int = 0
    """Captions of each image."""
    context_shape: tuple[int, int] = (0, 0)
    """(tokens, width) of a caption's features."""
    versions: tuple[str, ...] = ()
    """Packages that made the latents, in the order in which they were first used."""

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
        """Names a shard."""
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.arrow"

    def covered(self, shard: int) -> range:
        """Says which images of the source a shard covers."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def features(self) -> datasets.Features:
        """The columns of a shard."""
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
        """The columns of a shard as Arrow knows them, with the facts that tie it to its manifest."""
        schema = self.features().arrow_schema
        facts = {FACT_PREFIX + name.encode(): json.dumps(getattr(self, name)) for name in SHARD_FACTS}
        return schema.with_metadata({**schema.metadata, **facts})


def is_latent_data(name: str | Path) -> bool:
    """Tells whether a data set's name is a folder of latents."""
    return os.path.isfile(Path(name) / MANIFEST_FILE)


def is_whole(shard: Path) -> bool:
    """Tells whether a shard is there and was written to its end."""
    if not os.path.isfile(shard):
        return False
    with open(shard, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(END_OF_STREAM)))
        return file.read() == END_OF_STREAM


def read_manifest(folder: str | Path) -> Manifest:
    """Reads what a folder of latents holds.

    Raises:
        InputError: a manifest that cannot be read, or that cannot be one.
    """
    path = Path(folder) / MANIFEST_FILE
    raw = read_json(path)
    try:
        return from_dict(Manifest, raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@dataclass(frozen=True)
class _Rows:
    """A column of fixed-size rows over many Arrow files, read by position.

    Rows are read, not mapped: what is read of a data set larger than memory does not stay in the process.
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
    """Moments of latents with labels, and captions with their features."""

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


@contextlib.contextmanager
def write_shard(folder: Path, manifest: Manifest, shard: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that adds rows, column by column; the shard is there once the block has ended without an error.

    Raises:
        InputError: it cannot be written.
    """
    schema = manifest.schema()
    with (
        write_aside(folder / manifest.shard_file(shard)) as aside,
        pa.OSFile(str(aside), "wb") as file,
        pa.ipc.new_stream(file, schema) as stream,
    ):

        def add(rows: Mapping[str, Any]) -> None:
            columns = [_to_arrow(rows[field.name], field.type) for field in schema]
            stream.write_batch(pa.record_batch(columns, schema=schema))

        yield add


def _to_arrow(values: Any, kind: pa.DataType) -> pa.Array:
    """One column: an array of numbers, its rows flattened, or a list of Python values."""
    if isinstance(values, np.ndarray) and pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    return pa.array(values, type=kind)


def load_latents(config: DataConfig, model: UViTConfig) -> LatentData:
    """Loads latents for a model.

    Args:
        config: the folder, and what its latents should be.
        model: the shape of latents and context, and whether labels or captions are needed.

    Raises:
        InputError: shards that are missing or broken, or latents that do not fit, with both values.
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
                if not is_whole(file):
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
            raise InputError(f"{file} is not a whole shard of latents ({type(error).__name__})") from None
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
    """Compares a shard with what its folder's manifest says of it."""
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
    except Exception as error:  # broken bytes raise anything
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}): run the same encode.py command again"
        ) from None
    if not isinstance(context, np.ndarray) or context.shape != shape or context.dtype != np.float16:
        found = f"{context.shape} {context.dtype}" if isinstance(context, np.ndarray) else type(context).__name__
        raise InputError(f"{path} must hold float16 numbers of shape {shape}, got {found}")
    return torch.from_numpy(context)[None]


class _Chunks:
    """Collects where the chunks of a column lie."""

    def __init__(self) -> None:
        self.files: list[int] = []
        self.lengths: list[int] = []
        self.offsets: list[int] = []

    def add(self, file: int, column: pa.FixedSizeListArray, start: int) -> None:
        """Adds a chunk of a file that is mapped from the address `start` on."""
        self.files.append(file)
        self.lengths.append(len(column))
        self.offsets.append(column.flatten().buffers()[1].address - start)

    def rows(self, files: Sequence[Path], width: int) -> _Rows:
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)
        return _Rows(files, np.array(self.files), starts, np.array(self.offsets), width)


def _check_fit(config: DataConfig, model: UViTConfig, manifest: Manifest) -> None:
    """Compares what the config asks for with what the latents are."""
    latent_shape = (model.in_chans, *model.image_shape)
    expected: dict[str, tuple[object, object]] = {
        "shape of latents (model.in_chans, model.img_size)": (manifest.latent_shape, latent_shape),
        "data.scale_factor": (manifest.scale_factor, config.scale_factor),
        "data.crop": (manifest.crop, config.crop),
    }
    if model.context_dim:
        context_shape = (model.num_context_tokens, model.context_dim)
        name = "shape of context (model.num_context_tokens, model.context_dim)"
        expected[name] = (manifest.context_shape, context_shape)
    for name, (found, asked) in expected.items():
        if found != asked:
            raise InputError(f"data {config.name!r} was encoded with {name} {found}, got {asked}")
    if config.flip and manifest.flips == 1:
        raise InputError(f"data {config.name!r} was encoded without mirror images, got data.flip True")
    if config.autoencoder is None:
        made = f"latents of autoencoder {manifest.autoencoder!r}"
        raise InputError(f"data {config.name!r} has {made}, got data.autoencoder None")


def check_encoders(data: object, config: DataConfig, encoders: Encoders) -> None:
    """Checks that latents were made by a run's own encoders; data of another kind passes.

    Raises:
        InputError: another autoencoder or text encoder, with both names and hashes.
    """
    if not isinstance(data, LatentData):
        return
    manifest = data.manifest
    if encoders.image is not None:
        made_by, hashes = manifest.autoencoder, (manifest.encoder_hash, encoders.image.encoder_hash)
        _check_hash(f"data {config.name!r} was encoded by autoencoder", made_by, config.autoencoder, *hashes)
    if encoders.text is not None:
        made_by, hashes = str(manifest.text_encoder), (str(manifest.text_encoder_hash), encoders.text.weights_hash)
        _check_hash(f"data {config.name!r} was encoded by text encoder", made_by, config.text_encoder, *hashes)


def _check_hash(what: str, made_by: str, given: str | None, made_hash: str, given_hash: str) -> None:
    if made_hash != given_hash:
        raise InputError(f"{what} {made_by!r} (weights {made_hash}), got {given!r} (weights {given_hash})")


def check_begun(folder: Path, manifest: Manifest) -> None:
    """Checks that a folder of latents which is to be gone on with was begun in the same way.

    Raises:
        InputError: it was not, with both values.
    """
    if is_latent_data(folder):
        before = read_manifest(folder)
        for field in dataclasses.fields(Manifest):
            was, now = getattr(before, field.name), getattr(manifest, field.name)
            if was != now and field.name not in NAMES_ALONE:
                raise InputError(f"{folder} was begun with {field.name} {was!r}, got {now!r}: use another --output")


def begin(folder: Path, manifest: Manifest, empty_context: Tensor | None) -> None:
    """Puts away what an interrupted process has left half-written, and writes the manifest.

    Where the folder was begun before, its manifest stays and only learns which packages go on with it.

    Args:
        folder: the folder of latents, checked by check_begun.
        manifest: what it will hold.
        empty_context: (tokens, width) features of the empty caption, for latents with captions.

    Raises:
        InputError: it cannot be written.
    """
    for half_written in folder.glob(".shard-*"):
        half_written.unlink(missing_ok=True)
    if empty_context is not None:
        with write_aside(folder / EMPTY_CONTEXT_FILE) as aside:
            np.save(aside, empty_context.half().cpu().numpy(), allow_pickle=False)
    if is_latent_data(folder):
        before = read_manifest(folder)
        versions = tuple(dict.fromkeys(before.versions + manifest.versions))
        manifest = dataclasses.replace(before, versions=versions)
    write_text(folder / MANIFEST_FILE, to_json(manifest))
