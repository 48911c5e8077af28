"""Data sets of images with labels and captions, from the hub, a folder or a file, read in batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uvit.common.cli import is_first_process
from uvit.common.errors import InputError, one_line, printable
from uvit.common.libraries import quiet
from uvit.common.messages import tell
from uvit.config import DataConfig
from uvit.data.batch import MIN_IMAGES, Batch, ImageData, ImageSpec
from uvit.data.captions import CAPTION_COLUMNS
from uvit.data.embedded import PHOTO_SHAPE, Arrays, Digits, Photos
from uvit.data.idx import is_idx_data, load_idx
from uvit.data.image_folder import FolderImages, holds_images, list_images, walk
from uvit.data.images import fit_image, is_grey, open_image


@dataclass(frozen=True)
class HubData:
    """Images of a Hugging Face data set, decoded, cropped and converted as they are read."""

    rows: Any
    fingerprint: str
    """Hash of the content, as `datasets` computes it."""
    shape: tuple[int, int, int]
    cut: bool
    """Whether images are cropped to the shape; otherwise they must have it."""
    config: DataConfig
    image_column: str
    label_column: str | None
    caption_column: str | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_grey(self) -> bool:
        """Whether no image has colours."""
        return all_grey(row[self.image_column] for row in self.rows)

    def read(self, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        columns = self.rows[list(indices)]
        items: list[tuple[np.ndarray, int, Sequence[str]]] = []
        skipped: list[str] = []
        for number, index in enumerate(indices):
            try:
                items.append(self._item(index, {name: values[number] for name, values in columns.items()}, rng))
            except InputError as error:
                if self.config.on_error == "stop":
                    raise
                skipped.append(str(error))
        images = np.stack([item[0] for item in items]) if items else np.empty((0, *self.shape), np.uint8)
        labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
        captions = [] if self.caption_column is None else [item[2] for item in items]
        return Batch(torch.from_numpy(images), labels, captions, skipped=skipped)

    def _item(
        self, index: int, row: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[np.ndarray, int, Sequence[str]]:
        """Returns the pixels, the label (0 where there are none) and the captions of a row."""
        label = 0 if self.label_column is None else row[self.label_column]
        if label is None or label < 0:
            raise InputError(f"image {index} of the data must have a label of at least 0, got {label}")
        stored = [] if self.caption_column is None else row[self.caption_column]
        texts = [stored] if isinstance(stored, str) else stored
        if self.caption_column is not None and (not texts or None in texts):
            raise InputError(f"image {index} of the data must have a caption, got {stored!r}")
        channels, height, width = self.shape
        with _named(index, row[self.image_column]) as file:
            image = open_image(file, channels)
            if not self.cut and (image.height, image.width) != (height, width):
                found = f"it is {image.height}x{image.width}, the first image {height}x{width}"
                raise InputError(f"{found}: expected images of one size, or an image_size to crop them to")
            return fit_image(image, height, width, rng if self.config.crop == "random" else None), label, texts


@contextlib.contextmanager
def _named(index: int, file: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a row's image file, and turns any failure to read it into an error that names it."""
    try:
        if file is None:
            raise InputError("it is missing")
        yield file
    except Exception as error:  # for a broken file, a decoder may raise any type
        name = f" ({file['path']})" if file and file["path"] else ""
        raise InputError(f"image {index} of the data{name} cannot be read: {error}") from None


def load_images(config: DataConfig, spec: ImageSpec, train: bool = True) -> ImageData:
    """Loads images.

    Args:
        config: which data, and how to crop images.
        spec: what to read.
        train: whether to load the training part, rather than the held-out part.

    Raises:
        InputError: data that cannot be found or read, or that lacks what `spec` asks for.
    """
    channels = {"digits": (1,), "photos": (3,)}.get(config.name, (1, 3))
    if spec.shape is not None and spec.shape[0] not in channels:
        grey_or_rgb = " or ".join({1: "1 (grey)", 3: "3 (RGB)"}[each] for each in channels)
        raise InputError(f"data {config.name!r} can have {grey_or_rgb} channels, got {spec.shape[0]}")
    if config.name == "digits":
        if spec.shape not in (None, Digits.shape):
            raise InputError(f"digits are 1x8x8 images, got a model for {'x'.join(map(str, spec.shape or ()))}")
        return Digits.load(train)
    if config.name == "photos":
        return Photos.load(spec.shape or PHOTO_SHAPE, train)
    if Path(config.name).suffix == ".npz":
        return Arrays.load(Path(config.name), spec.shape)
    split = config.train_split if train else config.test_split
    return load_idx(config, spec, split) if is_idx_data(config.name) else _load_rows(config, spec, split)


def _folder_rows(found: FolderImages, config: DataConfig) -> Any:
    """Returns the images of a folder as rows; a slash is in no name of a column of captions."""
    import datasets

    columns: dict[str, Sequence[Any]] = {"/image": found.files}
    features: dict[str, Any] = {"/image": datasets.Image()}
    if found.labels is not None:
        columns["/label"], features["/label"] = found.labels, datasets.ClassLabel(names=list(found.class_names))
    if found.captions is not None:
        name = config.caption_column or CAPTION_COLUMNS[0]
        columns[name], features[name] = found.captions, datasets.List(datasets.Value("string"))
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def _library_rows(config: DataConfig, split: str) -> tuple[Any, str]:
    """Returns the rows that `datasets` finds under a name or in a folder of other files, and their fingerprint."""
    import datasets

    path = Path(config.name)
    if isdir(path) and not any(file.is_file() for file in path.rglob("*")):
        raise InputError(
            f"data folder {config.name} is empty: expected images, in a folder per class or not, or a saved data set"
        )
    try:
        if _is_saved(config.name):
            rows = datasets.load_from_disk(config.name)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise InputError(f"it has {', '.join(rows) or 'none'}")
                rows = rows[split]
        else:
            with quiet("huggingface_hub", *(("datasets",) if isdir(path) else ())):  # a download keeps its bar
                rows = datasets.load_dataset(config.name, split=split)
    except Exception as error:  # the library raises many types, depending on what is wrong
        reason = one_line(error, 200) or type(error).__name__
        raise InputError(f"cannot load split {split!r} of data {config.name!r}: {reason}") from None
    return rows, rows._fingerprint


def _is_saved(name: str) -> bool:
    """Returns whether a data set's name is a folder that `datasets` has saved."""
    return isfile(Path(name, "dataset_dict.json")) or isfile(Path(name, "state.json"))


def _load_rows(config: DataConfig, spec: ImageSpec, split: str) -> HubData:
    """Loads a folder of image files, or what `datasets` loads."""
    import datasets

    files = walk(Path(config.name)) if isdir(config.name) and not _is_saved(config.name) else {}
    if holds_images(files):
        found = list_images(config, files, split, spec.labels, bool(spec.captions))
        if is_first_process():
            tell(printable(f"{config.name}, {split}: {found.describe()}"))
        rows, fingerprint = _folder_rows(found, config), found.fingerprint
    else:
        rows, fingerprint = _library_rows(config, split)

    def column(
        what: str,
        fits: Callable[[Any], bool],
        needed: bool | None,
        chosen_by: str | None = None,
        usual: Sequence[str] = (),
    ) -> str | None:
        """Returns the column of a kind: the one that the config's field names, else the only one that is likely.

        Where it is not needed and several are likely, there is none, which is said.
        """
        name = getattr(config, chosen_by) if chosen_by else None
        found = [each for each, kind in rows.features.items() if fits(kind) and name in (None, each)]
        if not found and (needed or (name and needed is None)):
            named, columns = "" if name is None else f" {name!r}", ", ".join(rows.features)
            raise InputError(f"data {config.name!r} must have a column{named} of {what}, got columns {columns}")
        if needed is False or not found:
            return None
        likely = [each for each in found if each in usual] or found
        if len(likely) == 1 or not chosen_by:
            return likely[0]
        several = f"data {config.name!r} has several columns of {what}, {', '.join(likely)}: choose one by {chosen_by}"
        if needed:
            raise InputError(several)
        tell(printable(f"{several}; none is read"))
        return None

    image_column = column("images", lambda kind: isinstance(kind, datasets.Image), True) or ""
    if len(rows) < MIN_IMAGES:
        raise InputError(
            f"split {split!r} of data {config.name!r} must have {MIN_IMAGES} images or more, got {len(rows)}"
        )
    label_column = column(
        "labels (ClassLabel)", lambda kind: isinstance(kind, datasets.ClassLabel), spec.labels, "label_column"
    )
    caption_column = column("captions", _is_text, spec.captions, "caption_column", CAPTION_COLUMNS)
    class_names = () if label_column is None else tuple(rows.features[label_column].names)
    read = [name for name in (image_column, label_column, caption_column) if name is not None]
    rows = rows.select_columns(read).cast_column(image_column, datasets.Image(decode=False))  # decoded by open_image
    shape = spec.shape
    if shape is None:
        with _named(0, rows[0][image_column]) as file:
            first = open_image(file, 3)
        shape = (1 if all_grey(row[image_column] for row in rows) else 3, first.height, first.width)
    return HubData(
        rows,
        fingerprint,
        shape,
        spec.shape is not None,
        config,
        image_column,
        label_column,
        caption_column,
        class_names,
    )


def all_grey(files: Iterable[Any]) -> bool:
    """Returns whether no image has colours; those that cannot be read do not count."""
    for file in files:
        with contextlib.suppress(Exception):  # for a broken file, a decoder may raise any type
            if not is_grey(file):
                return False
    return True


def _is_text(kind: Any) -> bool:
    """Returns whether a column of `datasets` holds a string, or a list of strings, in each row."""
    return getattr(getattr(kind, "feature", kind), "dtype", None) in ("string", "large_string")
