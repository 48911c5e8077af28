"""Which files of a folder are its images, with which labels and captions: decided here, so that none is lost or moved.

| the folder has | a part is | labels | captions |
|---|---|---|---|
| images, in it or in folders at any depth | all of it, the part `train` | none | by `captions` |
| folders, none named as a part | all of it, the part `train` | the folders of the first level | by `captions` |
| folders all named as parts (`train`, `test`, …) | the folder of its name | the folders in it | by `captions` |

Folders that may be meant as parts and are not all named as such are refused. Captions are in a `metadata.csv` or
`metadata.jsonl`, each in any folder, whose column `file_name` is relative to it; an image without a line there has them
in a `.txt` of its name beside it. Links are followed, once to each folder. Names that begin with a dot are hidden. A
file is an image by its ending, in any case. What is passed over is counted, with the reason.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from uvit.common.errors import InputError
from uvit.config import NO_TEXT, DataConfig
from uvit.data.captions import Names, read_captions

TRAIN, VALIDATION = "train", ("validation", "val", "valid", "dev")
PARTS = (TRAIN, "test", *VALIDATION)
"""Names of folders, in any case, that hold a part of the data; besides, those that the config names."""
LIKE_A_PART = re.compile(r"(train|training|test|testing|validation|val|valid|dev|eval|holdout)([\W\d_].*)?", re.DOTALL)
"""What may be meant as a part."""
TABLES = (".parquet", ".arrow")
"""Endings of files that hold the images themselves: pictures beside them are not the data."""
HIDDEN = "hidden file", "hidden files"
HIDDEN_FOLDER = "hidden folder", "hidden folders"
REPEATED = "link to a folder that is read already", "links to folders that are read already"
UNREADABLE = "link to nothing or no file", "links to nothing or no files"
UNNAMED = "name that is no text", "names that are no text"
OTHER = "file that is no image", "files that are no images"
NO_PART = "image in no part", "images in no part"
NO_CLASS = "image in no class", "images in no class"
NO_CAPTION = "image without a caption", "images without a caption"
NO_IMAGE = "line of metadata without an image", "lines of metadata without an image"
NOT_PIXELS = ("BUFR", "GRIB", "HDF5", "MPEG")
"""Formats that Pillow identifies and cannot decode."""

Reason = tuple[str, str] | None
"""What is passed over, in the singular and the plural; None is taken."""


@dataclass(frozen=True)
class FolderImages:
    """The images of one part of a folder, in the order of their names."""

    folder: Path
    names: Sequence[Names]
    labels: Sequence[int] | None
    class_names: tuple[str, ...]
    captions: Sequence[Sequence[str]] | None
    passed_over: Mapping[tuple[str, str], int]
    """What was not taken, in the singular and the plural, and how many of it there are."""

    @property
    def files(self) -> list[str]:
        """Paths of the images."""
        return [os.path.join(self.folder, *names) for names in self.names]

    def describe(self) -> str:
        """Says what was taken and what was not."""
        text = count_of(len(self.names), "image", "images")
        if self.labels is not None:
            text += f" in {count_of(len(self.class_names), 'class', 'classes')}"
        if self.passed_over:
            text += f"; passed over: {', '.join(count_of(count, *names) for names, count in self.passed_over.items())}"
        return text

    @property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times of change of the files, and of their labels and captions.

        Raises:
            InputError: a file is gone.
        """
        digest = hashlib.sha256()
        for number, file in enumerate(self.files):
            try:
                stat = os.stat(file)
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror}") from None
            about = self.labels and self.labels[number], self.captions and self.captions[number]
            digest.update(repr((self.names[number], stat.st_size, int(stat.st_mtime), about)).encode())
        return digest.hexdigest()[:16]


def count_of(number: int, singular: str, plural: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {singular if number == 1 else plural}"


@functools.cache
def image_endings() -> tuple[str, ...]:
    """Returns the endings of files that Pillow decodes, in lower case, with their dot."""
    endings = Image.registered_extensions()
    return tuple(each for each, kind in endings.items() if kind in Image.OPEN and kind not in NOT_PIXELS)


def is_image(names: Names) -> bool:
    """Returns whether a file is an image by its ending."""
    return names[-1].lower().endswith(image_endings())


def walk(folder: Path) -> dict[Names, Reason]:
    """Returns what is in a folder at any depth, by name, with the reason where it cannot be taken.

    Links are followed after all else, and no folder is read twice.

    Raises:
        InputError: a folder that cannot be read.
    """
    found: dict[Names, Reason] = {}
    folders: list[Names] = [()]
    links: list[Names] = []
    read: set[str] = set()
    while folders or links:
        names = folders.pop() if folders else links.pop(0)
        path = os.path.join(folder, *names)
        if (real := os.path.realpath(path)) in read:
            found[names] = REPEATED
            continue
        read.add(real)
        try:
            with os.scandir(path) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        for entry in entries:
            below = (*names, entry.name)
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link to itself, for example
                is_folder = is_file = False
            if entry.name.startswith("."):
                found[below] = HIDDEN_FOLDER if is_folder else HIDDEN
            elif NO_TEXT.search(entry.name):
                found[below] = UNNAMED
            elif is_folder:
                (links if entry.is_symlink() else folders).append(below)
            else:
                found[below] = None if is_file else UNREADABLE
    return dict(sorted(found.items()))


def holds_images(found: Mapping[Names, Reason]) -> bool:
    """Returns whether a folder is one of image files, rather than of tables that hold them."""
    files = [names for names, reason in found.items() if reason is None]
    return any(map(is_image, files)) and not any(names[-1].lower().endswith(TABLES) for names in files)


def find_part(config: DataConfig, images: Iterable[Names], split: str) -> tuple[str | None, list[str]]:
    """Returns the subfolder of a part, and those of all parts: None and none where the whole is one part.

    Raises:
        InputError: no such part, or subfolders that may be meant as parts, and are not all named as such.
    """
    images = [names for names in images if len(names) > 1]
    found = dict.fromkeys(names[0] for names in images)
    known = {name.lower() for name in (*PARTS, config.train_split, config.test_split)}
    parts = [name for name in found if name.lower() in known]
    place, advice = f"data {config.name!r}", "name them by --data.train_split and --data.test_split, or rename classes"
    if len(parts) == len(found) > 0:
        same = (split, *VALIDATION) if split in VALIDATION else (split,)
        chosen = [name for name in parts if name.lower() in map(str.lower, same)]
        if len(chosen) != 1:
            raise InputError(f"{place} must have one part {split!r}, got {', '.join(parts)}")
        return chosen[0], parts
    if parts or (found and all(LIKE_A_PART.fullmatch(name.lower()) for name in found)):
        raise InputError(f"folders in {place} must all be parts or all be classes, got {', '.join(found)}: {advice}")
    if len(found) == 1:
        inner = dict.fromkeys(names[1] for names in images if len(names) > 2)
        if inner and all(name.lower() in known for name in inner):
            raise InputError(f"{place} must be the folder of the parts, got them in its folder {next(iter(found))}")
    if split != TRAIN:
        raise InputError(f"{place} has no part {split!r}: expected folders {TRAIN} and {split}")
    return None, []


def list_images(
    config: DataConfig, found: Mapping[Names, Reason], split: str, labels: bool | None, captions: bool
) -> FolderImages:
    """Lists the images of a part of a folder.

    Args:
        config: whose `name` is the folder.
        found: what is in it, from `walk`.
        split: the part.
        labels: whether they have labels; None where there are folders of classes.
        captions: whether they have captions.

    Raises:
        InputError: no such part, or images without the labels or captions asked for.
    """
    folder = Path(config.name)
    every = [names for names, reason in found.items() if reason is None and is_image(names)]
    part, parts = find_part(config, every, split)
    root = () if part is None else (part,)
    depth = len(root)
    # Other parts are not passed over; what is beside all of them is.
    reasons = {names: reason for names, reason in found.items() if names[0] not in parts or names[0] == part}
    images = [names for names in every if names[:depth] == root]
    reasons |= {names: OTHER for names, reason in reasons.items() if reason is None and not is_image(names)}
    reasons |= {names: NO_PART for names in every if parts and len(names) == 1}

    # The classes of all parts, so that a label means the same in each.
    class_names = sorted({names[depth] for names in every if len(names) > depth + 1})
    if labels and not class_names:
        raise InputError(f"data {config.name!r} must have a folder for each class, got images in none")
    with_labels = bool(class_names) if labels is None else labels
    if with_labels:
        reasons |= {names: NO_CLASS for names in images if len(names) == depth + 1}

    texts: dict[Names, tuple[str, ...]] = {}
    if captions:
        files = [names for names, reason in found.items() if reason is None]
        texts, sources = read_captions(folder, files, images, root, config.caption_column)
        reasons |= dict.fromkeys(sources & reasons.keys())
        reasons |= {names: NO_IMAGE for names in texts if names[:depth] == root and names not in reasons}
        bare = [names for names in images if not reasons[names] and names not in texts]
        if bare and config.on_error == "stop":
            given = f"got {len(bare):,} without, such as {os.path.join(folder, *bare[0])}"
            raise InputError(f"each image of data {config.name!r} must have a caption, {given}")
        reasons |= dict.fromkeys(bare, NO_CAPTION)

    taken = [names for names in images if not reasons[names]]
    number = {name: index for index, name in enumerate(class_names)}
    return FolderImages(
        folder,
        taken,
        [number[names[depth]] for names in taken] if with_labels else None,
        tuple(class_names) if with_labels else (),
        [texts[names] for names in taken] if captions else None,
        Counter(filter(None, reasons.values())),
    )
