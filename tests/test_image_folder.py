"""A folder's images are exactly those in it, against folders whose content is known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.image_folder import (
    HIDDEN,
    HIDDEN_FOLDER,
    LIKE_A_PART,
    NO_CLASS,
    NO_PART,
    OTHER,
    REPEATED,
    FolderImages,
    list_images,
    walk,
)

GREY = ImageSpec((1, 2, 2), labels=None, captions=False)
# Words that libraries take for parts, what a shell or a URL would expand, and what is sorted in an unusual place.
NAMES = ("a", "train set", "test tube", "val-1", "__init__", "[x]", "a::b", "Ümläut", "trains", "0")
ENDINGS = (".png", ".Png", ".PNG", ".bmp")


def put(path: Path, grey: int = 0) -> Path:
    """Saves an image of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("L", (2, 2), grey).save(file, "BMP" if path.suffix == ".bmp" else "PNG")
    return path


def read(folder: Path, train: bool = True, labels: bool | None = None, **fields) -> dict[int, str | None]:
    """Returns the class of each image that is loaded, by its grey; they must differ."""
    spec = ImageSpec(GREY.shape, labels, captions=False)
    data = load_images(DataConfig(name=str(folder), **fields), spec, train)
    batch = read_all(data)
    greys = batch.images[:, 0, 0, 0].tolist()
    assert len(set(greys)) == len(greys)
    names = [data.class_names[label] if data.class_names else None for label in batch.labels]
    return dict(zip(greys, names))


def listed(folder: Path, labels: bool | None = None, captions: bool = False) -> FolderImages:
    """Lists the part `train`."""
    return list_images(DataConfig(name=str(folder)), walk(folder), "train", labels, captions)


@st.composite
def trees(draw):
    """Draws the names of parts, and for each file of a folder its path, its part and its class, or None."""
    parts = draw(st.sampled_from([(None,), ("train",), ("train", "test"), ("Train", "TEST"), ("train", "test", "val")]))
    classes = draw(st.lists(st.sampled_from(NAMES + (("train", "test") if parts != (None,) else ())), unique=True))
    if parts == (None,) and all(map(LIKE_A_PART.fullmatch, classes)):
        classes = ["a", *classes]  # alone, they may be meant as parts
    files = []
    for part in parts:
        for name in classes or [None]:
            folders = [each for each in (part, name) if each is not None]
            for number in range(draw(st.integers(2, 3))):
                deeper = draw(st.sampled_from([(), (), ("deep", "er")])) if name else ()
                ending = draw(st.sampled_from(ENDINGS))
                stem = draw(st.sampled_from(["", "train ", "test-", "__", "[0]"])) + str(number)
                files.append((Path(*folders, *deeper, stem + ending), (part, name)))
    return parts, list(dict(files).items())


@settings(deadline=None, max_examples=150)
@given(trees(), st.booleans())
def test_no_image_is_lost_none_is_taken_twice_and_none_is_in_two_parts(tmp_path_factory, tree, noise):
    parts, files = tree
    folder = tmp_path_factory.mktemp("tree") / "data [1]::x"
    expected: dict[str | None, dict[int, str | None]] = {part: {} for part in parts}
    for grey, (path, (part, name)) in enumerate(files):
        put(folder / path, grey)
        expected[part][grey] = name
    if noise:
        (folder / "notes train.md").write_text("x")
        (folder / files[0][0].parent / ".hidden.png").write_bytes(b"x")
    if len(expected[parts[0]]) < 2:
        return
    assert read(folder) == expected[parts[0]]
    others = [part for part in parts[1:] if part.lower() == "test"]
    if others:
        assert read(folder, train=False) == expected[others[0]]
    else:
        with pytest.raises(InputError, match="part 'test'"):
            read(folder, train=False)
    assert set(read(folder, labels=False)) == set(expected[parts[0]])


def test_what_is_passed_over_is_counted_with_its_reason(tmp_path, capsys):
    grey = iter(range(100))
    for part in ("train", "test"):
        for name in ("finch", "heron", "test"):
            for number in range(2):
                put(tmp_path / part / name / f"{number}.png", next(grey))
    put(tmp_path / "train" / "stray.png")
    put(tmp_path / "cover.png")
    put(tmp_path / "train" / "finch" / ".thumb" / "0.png")
    put(tmp_path / "train" / "finch" / ".0.png")
    (tmp_path / "train" / "finch" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "train" / "heron" / "loop").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "heron" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = listed(tmp_path, labels=True)
    assert len(found.files) == 6 and found.class_names == ("finch", "heron", "test")
    assert {found.passed_over[kind] for kind in (HIDDEN, HIDDEN_FOLDER, REPEATED, NO_CLASS, NO_PART, OTHER)} == {1}
    load_images(DataConfig(name=str(tmp_path)), ImageSpec((1, 2, 2), True, False))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}, train: 6 images in 3 classes; passed over: ")
    passed_over = line.partition("passed over: ")[2].split(", ")
    assert set(passed_over) == {
        "1 hidden file",
        "1 file that is no image",
        "1 hidden folder",
        "1 link to a folder that is read already",
        "1 link to nothing or no file",
        "1 image in no class",
        "1 image in no part",
    }
    # Without labels, images beside the classes are images too.
    unlabelled = listed(tmp_path, labels=False)
    assert len(unlabelled.files) == 7 and unlabelled.labels is None and unlabelled.class_names == ()


def test_classes_have_one_number_in_all_parts(tmp_path):
    for number, name in enumerate(("train/a", "train/b", "train/c", "test/b", "test/c")):
        for copy in range(2):
            put(tmp_path / name / f"{copy}.png", 10 * number + copy)
    test = load_images(DataConfig(name=str(tmp_path)), GREY, train=False)
    assert test.class_names == ("a", "b", "c") and read_all(test).labels.tolist() == [1, 1, 2, 2]


def test_linked_classes_and_images_are_followed(tmp_path):
    for number in range(2):
        put(tmp_path / "store" / f"{number}.png", number)
        put(tmp_path / "data" / "plain" / f"{number}.png", 10 + number)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "data" / "plain" / "link.png").symlink_to(put(tmp_path / "store2" / "x.png", 20))
    assert read(tmp_path / "data") == {0: "linked", 1: "linked", 10: "plain", 11: "plain", 20: "plain"}


def test_parts_of_other_names_can_be_named(tmp_path):
    for number, name in enumerate(("train2017", "val2017", "valid")):
        for copy in range(2):
            put(tmp_path / name / f"{copy}.png", 10 * number + copy)
    fields = {"train_split": "train2017", "test_split": "val2017"}
    assert set(read(tmp_path, **fields)) == {0, 1} and set(read(tmp_path, train=False, **fields)) == {10, 11}
    (tmp_path / "val2017").rename(tmp_path / "train")
    (tmp_path / "train2017").rename(tmp_path / "test")
    assert set(read(tmp_path, train=False, test_split="validation")) == {20, 21}


def test_a_folder_of_tables_is_not_one_of_the_pictures_beside_them(tmp_path):
    rows = {"image": [Image.new("L", (2, 2), grey) for grey in (5, 6)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "train.parquet"))
    for number in range(3):
        put(tmp_path / "assets" / f"{number}.png", 90 + number)
    assert set(read(tmp_path)) == {5, 6}


@pytest.mark.parametrize(
    ("folders", "train", "message"),
    [
        (("train", "test", "more"), True, r"must all be parts or all be classes, got more, test, train: name them"),
        (("bus", "car", "train"), True, r"must all be parts or all be classes, got bus, car, train: name them by"),
        (("train2017", "val2017"), True, r"must all be parts or all be classes, got train2017, val2017: name them by"),
        (("training", "eval"), True, r"must all be parts or all be classes, got eval, training: name them by"),
        (("images/train", "images/test"), True, r"must be the folder of the parts, got them in its folder images"),
        (("train", "Train"), True, r"must have one part 'train', got Train, train"),
        (("validation",), True, r"must have one part 'train', got validation"),
        (("train",), False, r"must have one part 'test', got train"),
        (("cat", "dog"), False, r"has no part 'test': expected folders train and test"),
    ],
)
def test_what_could_be_parts_or_classes_is_refused(tmp_path, folders, train, message):
    for name in folders:
        put(tmp_path / name / "0.png")
    if len({name.lower() for name in os.listdir(tmp_path)}) < len(folders):
        pytest.skip("this file system knows no case")
    with pytest.raises(InputError, match=message):
        load_images(DataConfig(name=str(tmp_path)), GREY, train)


def captions_of(folder: Path, **fields) -> list[list[str]]:
    """Returns the captions of the images of a folder, by their greys from 0 on."""
    data = load_images(DataConfig(name=str(folder), **fields), ImageSpec((1, 2, 2), False, True))
    batch = read_all(data)
    captions = dict(zip(batch.images[:, 0, 0, 0].tolist(), map(list, batch.captions)))
    return [captions[grey] for grey in sorted(captions)]


@pytest.fixture
def three(tmp_path):
    """A folder of three images, 0.png to 2.png."""
    for number in range(3):
        put(tmp_path / f"{number}.png", number)
    return tmp_path


def test_captions_are_what_the_files_say(three):
    """Words that tables read as nothing, numbers, quotes, lines, other scripts, and lines in another order."""
    texts = ["NA", "None", "7"], ['he said "hi", twice', "two\nlines", "鳥 🐦"], ["null", "1.00", "nan"]
    for each in texts:
        quoted = [text.replace('"', '""') for text in each]
        lines = [f'{number}.png,"{quoted[number]}"' for number in (2, 0, 1)]
        for start, end in (("", "\n"), ("\ufeff", "\r\n")):
            (three / "metadata.csv").write_bytes(end.join([f"{start}file_name,text", *lines, ""]).encode())
            assert captions_of(three) == [[text] for text in each]
    (three / "metadata.csv").unlink()
    rows = [
        {"file_name": "0.png", "text": 7},
        {"file_name": "1.png", "text": ["b", "c"]},
        {"file_name": "./2.png", "text": "d"},
    ]
    (three / "metadata.jsonl").write_text("\r\n\r\n".join(map(json.dumps, rows)))
    assert captions_of(three) == [["7"], ["b", "c"], ["d"]]
    for wrong in ('{"raw": "a"}', "true", "[[]]", '"\\ud800"'):
        (three / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": {wrong}}}')
        with pytest.raises(InputError, match=r"captions in .*metadata.jsonl must be texts, got "):
            captions_of(three)


def test_a_text_beside_an_image_is_its_caption(three):
    for number in range(3):
        (three / f"{number}.txt").write_text(f"caption {number}\n")
    assert captions_of(three) == [["caption 0"], ["caption 1"], ["caption 2"]]
    (three / "metadata.jsonl").write_text('{"file_name": "1.png", "prompt": "from metadata"}')
    assert captions_of(three) == [["caption 0"], ["from metadata"], ["caption 2"]]
    (three / "1.txt").write_bytes(b"\xff")
    assert captions_of(three)[1] == ["from metadata"]
    (three / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*1\.txt: it is not UTF-8"):
        captions_of(three)


def test_an_image_without_a_caption_is_an_error_or_counted(three, capsys):
    (three / "metadata.csv").write_text("file_name,text\n0.png,a\n2.png,b\n9.png,c\n")
    with pytest.raises(InputError, match=r"each image of data .* must have a caption, got 1 without, such as .*1\.png"):
        captions_of(three)
    assert captions_of(three, on_error="skip") == [["a"], ["b"]]
    passed_over = capsys.readouterr().out.strip().partition("passed over: ")[2]
    assert set(passed_over.split(", ")) == {"1 image without a caption", "1 line of metadata without an image"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            b"file_name;text\n0.png;a\n",
            r"each line of .*metadata.csv must have a file_name, got file_name;",
        ),
        ("metadata.csv", "file_name,text\n0.png,müde\n".encode("latin-1"), r"cannot read .*: it is not UTF-8"),
        ("metadata.csv", b'file_name,text\n0.png,"a\n', r"cannot read .*metadata.csv"),
        (
            "metadata.csv",
            b"file_name,text\n0.png,a,b\n",
            r"cannot read .*metadata.csv: line 2 has more cells than columns",
        ),
        ("metadata.csv", b"file_name,text\n0.png,a\n./0.png,b\n", r"'0\.png' must have one line of metadata, got two"),
        ("metadata.csv", b"file_name,text\n,a\n,b\n", r"'' must have one line of metadata, got two"),
        (
            "metadata.csv",
            b"file_name,text,caption\n0.png,a,b\n",
            r"several columns of captions, text, caption: choose one by",
        ),
        ("metadata.csv", b"file_name\n0.png\n", r"must have a caption, got 3 without"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"\n', r"cannot read .*metadata.jsonl"),
        ("metadata.jsonl", b'["0.png", "a"]\n', r"each line of .*metadata.jsonl must have a file_name, got list"),
        (
            "metadata.jsonl",
            b'{"file_name": null, "text": "a"}\n',
            r"each line of .* must have a file_name, got file_name, text",
        ),
    ],
)
def test_broken_metadata_is_named(three, name, content, message):
    (three / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        captions_of(three)
    with pytest.raises(InputError, match=r"column 'x' of captions|cannot read|each line"):
        captions_of(three, caption_column="x")


def test_names_that_are_no_text_and_links_to_themselves_are_passed_over(tmp_path):
    put(tmp_path / "0.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    with open(os.fsencode(tmp_path / "x") + b"\xff.png", "wb") as file:
        Image.new("L", (2, 2)).save(file, "PNG")
    assert len(listed(tmp_path).files) == 1 and sum(listed(tmp_path).passed_over.values()) == 2


def test_links_between_folders_end(tmp_path):
    """Each image is read once, in the real folder rather than in one that is linked to it."""
    for number in range(9):
        put(tmp_path / f"f{number}" / "x.png", number)
        for other in range(9):
            (tmp_path / f"f{number}" / f"a{other}").symlink_to(tmp_path / f"f{other}", target_is_directory=True)
    (tmp_path / "all").symlink_to(tmp_path, target_is_directory=True)
    assert read(tmp_path) == {number: f"f{number}" for number in range(9)}


def test_captions_are_found_whatever_the_path_looks_like(three):
    for number in range(3):
        (three / f"{number}.TXT").write_text(f"caption {number}")
    (three / "sub").mkdir()
    (three / "sub" / "metadata.csv").write_text("file_name,text\n../1.png,from below\n")
    expected = [["caption 0"], ["from below"], ["caption 2"]]
    assert captions_of(three) == captions_of(three / "sub" / "..") == expected


def test_the_metadata_of_another_part_is_not_read(tmp_path):
    for part in ("train", "test"):
        for number in range(2):
            put(tmp_path / part / f"{number}.png", number).with_suffix(".txt").write_text("a caption")
    (tmp_path / "test" / "metadata.csv").write_text("id,label\n1,2\n")
    assert captions_of(tmp_path) == [["a caption"]] * 2


def test_the_fingerprint_follows_every_change(three):
    (three / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,c\n")

    def fingerprint() -> str:
        return listed(three, captions=True).fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    (three / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n2.png,other\n")
    seen.append(fingerprint())
    os.utime(put(three / "1.png", 9), ns=(1, 1))
    seen.append(fingerprint())
    (three / "2.png").rename(three / "3.png")
    (three / "metadata.csv").write_text("file_name,text\n0.png,a\n1.png,b\n3.png,other\n")
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    moved = three.rename(three.parent / "moved")
    assert listed(moved, captions=True).fingerprint == seen[-1]
