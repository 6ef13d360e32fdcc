"""`ImageFolder` on small folders of every kind of image."""

import os
import resource
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from src.data.sources import ImageFolder, folder, image_files
from src.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(path: Path, colour: Any = RED, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (32, 32), colour).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a folder of two classes, three training images and one test image."""
    root = tmp_path / "images"
    write(root / "train" / "dog" / "a.png", BLUE)
    write(root / "train" / "cat" / "b.png")
    write(root / "train" / "cat" / "a.png")
    write(root / "test" / "dog" / "a.png", BLUE)
    return root


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def load(root: Path, size: int = 32) -> dict[str, Any]:
    source = ImageFolder(str(root), size)
    source.prepare()
    return source.load()


def cached(root: Path) -> list[str]:
    return sorted(path.name for path in (root / folder.CACHE).iterdir())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the name of every file that is decoded."""
    names: list[str] = []
    original = image_files._decode

    def record(path: Path, size: int) -> np.ndarray:
        names.append(path.name)
        return original(path, size)

    monkeypatch.setattr(image_files, "_decode", record)
    return names


def test_images_come_by_class_then_path(root: Path) -> None:
    write(root / "train" / "cat" / "Z" / "deep" / "c.JPG", BLUE)
    for hidden in (".hidden.png", ".folder/x.png", "notes.txt"):
        path = root / "train" / "cat" / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    (root / "train" / ".hidden").mkdir()
    images = load(root)
    train = images["train"]
    assert ImageFolder(str(root)).classes == ("cat", "dog")
    assert train.names == [
        "train/cat/Z/deep/c.JPG", "train/cat/a.png", "train/cat/b.png", "train/dog/a.png",
    ]  # fmt: skip
    assert train.labels.tolist() == [0, 0, 0, 1]
    assert train.labels.dtype == np.int64
    assert train.pixels.shape == (4, 3, 32, 32)
    assert train.pixels.dtype == np.uint8
    assert train.pixels.flags.c_contiguous
    assert train.pixels[1, :, 0, 0].tolist() == [255, 0, 0]
    assert images["test"].labels.tolist() == [1]


def test_splits_are_those_that_exist(root: Path) -> None:
    write(root / "val" / "cat" / "a.png")
    (root / "test").rename(root / "unused")
    assert load(root).keys() == {"train", "val"}


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 255, 255), (0, 0, 255)),
        ("RGBA", (0, 0, 255, 0), (255, 255, 255)),
        ("LA", (9, 255), (9, 9, 9)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 77 * 256, (77, 77, 77)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_mode_becomes_rgb(root: Path, mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    write(root / "train" / "cat" / "a.png", colour, mode=mode)
    assert tuple(load(root)["train"].pixels[0, :, 5, 5]) == expected


def test_transparent_palette_is_laid_over_white(root: Path) -> None:
    write(root / "train" / "cat" / "a.png", 0, mode="P", transparency=b"\x00")
    assert tuple(load(root)["train"].pixels[0, :, 5, 5]) == (255, 255, 255)


def test_transparent_grey_of_16_bits_is_laid_over_white(root: Path) -> None:
    pixels = np.full((32, 32), 77 * 256, np.uint16)
    pixels[:16] = 1234
    Image.fromarray(pixels).save(root / "train" / "cat" / "a.png", transparency=1234)
    decoded = load(root)["train"].pixels[0]
    assert (decoded[:, 0, 0] == 255).all()
    assert (decoded[:, -1, 0] == 77).all()


def test_much_text_in_a_file_is_no_hindrance(root: Path) -> None:
    notes = PngInfo()
    notes.add_text("notes", "x" * 2**21, zip=True)
    Image.new("RGB", (32, 32), "blue").save(root / "train" / "cat" / "a.png", pnginfo=notes)
    assert load(root)["train"].pixels[0, 2].min() == 255


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG", "webp", "bmp", "Png"])
def test_every_format_is_read(root: Path, suffix: str) -> None:
    write(root / "train" / "cat" / f"0.{suffix}", BLUE)
    assert load(root)["train"].pixels[0, 2].min() > 240


def test_exif_turns_the_image_upright(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    left_half = np.zeros((32, 32, 3), dtype=np.uint8)
    left_half[:, :16] = 255
    Image.fromarray(left_half).save(root / "train" / "cat" / "a.png", exif=exif)
    pixels = load(root)["train"].pixels[0, 0]
    assert pixels[:16].min() == 255
    assert pixels[16:].max() == 0


def test_exif_whose_other_tags_are_broken_turns_the_image_too(root: Path) -> None:
    """Pillow's own `exif_transpose` writes all tags anew, and fails with a resolution that is text."""
    orientation = (0x0112, 3, 1, 6 << 16)  # a short: 6
    resolution = (0x011A, 2, 4, int.from_bytes(b"abc\0"))  # text, where two numbers should be
    tags = struct.pack(">2sHIH", b"MM", 42, 8, 2) + struct.pack(">HHII", *orientation)
    tags += struct.pack(">HHII", *resolution) + bytes(4)
    upper_half = np.zeros((32, 32, 3), dtype=np.uint8)
    upper_half[:16] = 255
    Image.fromarray(upper_half).save(root / "train" / "cat" / "a.png", exif=b"Exif\0\0" + tags)
    pixels = load(root)["train"].pixels[0, 0]
    assert pixels[:, 16:].min() == 255
    assert pixels[:, :16].max() == 0


def test_every_orientation_is_pillows(root: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation  # 1 to 8 mean something
        path = root / "train" / "cat" / "a.png"
        Image.fromarray(pixels).save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
        assert np.array_equal(load(root)["train"].pixels[0], expected), orientation


def test_two_hundred_megapixels_are_no_attack() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 16320, 12240, 8, 2, 0, 0, 0)
    file = BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    assert Image.open(file).size == (16320, 12240)


def test_want_of_memory_is_no_fault_of_the_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(path: Path, size: int) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(image_files, "_decode", decode)
    with pytest.raises(UserError, match=r"a\.png takes more memory than there is"):
        load(root)


def test_right_size_keeps_pixels_and_other_sizes_are_antialiased(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "train" / "cat" / "a.png")
    chessboard = np.indices((64, 96)).sum(0) % 2 * np.uint8(255)
    Image.fromarray(chessboard.astype(np.uint8)).save(root / "train" / "cat" / "b.png")
    pixels = load(root)["train"].pixels
    np.testing.assert_array_equal(pixels[0], noise.transpose(2, 0, 1))
    assert abs(pixels[1].astype(int) - 127).max() < 40
    assert load(root, size=8)["train"].pixels.shape == (3, 3, 8, 8)


def test_second_prepare_decodes_nothing(root: Path, decoded: list[str]) -> None:
    first = load(root)
    assert len(decoded) == 4
    again = load(root)
    assert len(decoded) == 4
    np.testing.assert_array_equal(first["train"].pixels, again["train"].pixels)


def test_added_file_is_decoded_and_the_old_cache_goes(root: Path, decoded: list[str]) -> None:
    load(root, size=16)
    load(root)
    before = cached(root)
    decoded.clear()
    write(root / "train" / "dog" / "new.png")
    assert len(load(root)["train"]) == 4
    assert sorted(decoded) == ["a.png", "a.png", "b.png", "new.png"]  # the test split is as it was
    after = cached(root)
    assert len(after) == len(before) == 4
    assert [name for name in before if name not in after] == [name for name in before if "train-32" in name]


def test_changed_time_alone_is_a_change(root: Path, decoded: list[str]) -> None:
    load(root)
    path = root / "test" / "dog" / "a.png"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    decoded.clear()
    load(root)
    assert decoded == ["a.png"]


def test_cache_goes_to_the_user_folder_when_the_root_cannot_be_written(
    root: Path, user_cache: Path, decoded: list[str]
) -> None:
    (root / folder.CACHE).write_text("a file where the folder should be")
    assert len(load(root)["train"]) == 3
    assert len(load(root)["train"]) == 3
    assert len(decoded) == 4
    assert len(list(user_cache.rglob("*.npy"))) == 2


def test_decoded_images_that_another_user_keeps_private_are_decoded_anew(
    root: Path, user_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(root)
    access, save = os.access, folder._save

    def refuse(pixels: np.ndarray, path: Path) -> None:
        if folder.CACHE in str(path):
            raise PermissionError(13, "Permission denied")
        save(pixels, path)

    monkeypatch.setattr(os, "access", lambda path, mode: folder.CACHE not in str(path) and access(path, mode))
    monkeypatch.setattr(folder, "_save", refuse)
    assert len(load(root)["train"]) == 3
    assert len(list(user_cache.rglob("*.npy"))) == 2


def test_nowhere_to_write_is_an_error_of_one_line(root: Path, user_cache: Path) -> None:
    (root / folder.CACHE).write_text("")
    user_cache.write_text("")
    with pytest.raises(UserError, match=r"cannot be stored in .* or .*make one writable"):
        load(root)


def test_a_write_that_breaks_off_is_told_as_such(root: Path) -> None:
    """A limit of this process stands in for a disk that fills up: numpy's own way to write knows no reason then."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(UserError, match=r"File too large.* or free some room"):
            load(root, size=256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_what_is_not_used_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "valid" / "cat").mkdir(parents=True)
    for name in ("c.HEIC", "d.tif", ".e.gif", "labels.txt"):
        (root / "train" / "cat" / name).touch()
    for name in ("z.jpg", "y.png", ".x.png", "notes.txt"):
        (root / "train" / name).touch()
    (root / "lost").symlink_to("nowhere")
    load(root)
    assert capsys.readouterr().out.splitlines() == [
        f"2 images in {root}/train are left out, for they are .heic, .tif: taken are .bmp, .jpeg, .jpg, .png, .webp",
        f"2 images in {root}/train itself are not used, for they are in no class folder: y.png, z.jpg",
        f"not used in {root}: valid (only train, val, test are)",
    ]


def test_what_is_not_used_need_not_be_readable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subfolders = folder._subfolders

    def refuse(place: Path) -> list[str]:
        if place == root:
            raise PermissionError(13, "Permission denied", str(place / "old"))
        return subfolders(place)

    monkeypatch.setattr(folder, "_subfolders", refuse)
    assert len(load(root)["train"]) == 3


def test_failed_write_leaves_no_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_the_disk(file: Any, array: np.ndarray) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fill_the_disk)
    with pytest.raises(UserError, match="No space left"):
        load(root)
    assert cached(root) == []


def test_load_without_prepare_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match="has not been decoded"):
        ImageFolder(str(root)).load()


def test_all_unreadable_files_are_named_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (root / "train" / "cat" / "a.png").read_bytes()
    (root / "train" / "cat" / "a.png").write_bytes(whole[: len(whole) // 2])
    (root / "train" / "cat" / "link.png").symlink_to("nowhere.png")
    (root / "train" / "cat" / "loop.png").symlink_to("loop.png")
    for number in range(10):
        (root / "test" / "dog" / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as refusal:
        load(root)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(
        name in message for name in ("train/cat/a.png", "train/cat/link.png", "train/cat/loop.png", "test/dog/6.jpg")
    )
    assert message.endswith("and 3 more")
    assert "7.jpg" not in message
    assert "test/dog/7.jpg" in capsys.readouterr().out.splitlines()


def test_damaged_pixels_are_no_image(root: Path) -> None:
    """A PNG of its whole length whose pixels break off: what could be read of it is black below."""
    path = root / "train" / "cat" / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[6000:6100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"unreadable images; mend or remove train/cat/a\.png"):
        load(root)


@pytest.mark.parametrize("small", [0, 2**40])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
def test_every_image_is_decoded_by_some_thread(
    root: Path, count: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(path: Path, size: int) -> np.ndarray:
        if path.name == "7":
            raise OSError("broken")
        return np.full((3, size, size), int(path.name) % 251, np.uint8)

    monkeypatch.setattr(image_files, "_decode", decode)
    monkeypatch.setattr(image_files, "_SMALL", small)
    pixels, failed = image_files.decode_all([Path(str(number)) for number in range(count)], 2, title="images")
    assert failed == [7] * (count > 7)
    expected = np.arange(count) % 251
    assert all((pixels[number] == expected[number]).all() for number in range(count) if number != 7)


@pytest.mark.parametrize(("size", "threads"), [(1000, 1), (50_000, 2)])
def test_thumbnails_are_decoded_by_one_thread(
    tmp_path: Path, size: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(number) for number in range(4)]
    for path in paths:
        path.write_bytes(bytes(size))
    monkeypatch.setattr(image_files, "CHUNK", 1)
    together = Barrier(threads)

    def decode(path: Path, size: int) -> np.ndarray:
        together.wait(timeout=60)  # of two threads, if there are two
        seen.add(get_ident())
        return np.zeros((3, size, size), np.uint8)

    seen: set[int] = set()
    monkeypatch.setattr(image_files, "_decode", decode)
    assert image_files.decode_all(paths, 2, title="images")[1] == []
    assert (len(seen) == 1) == (threads == 1)


def test_images_that_do_not_fit_in_memory_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, mmap_mode: str | None = None, **kwargs: Any) -> None:
        if mmap_mode is None:
            raise MemoryError

    source = ImageFolder(str(root), 1024)
    with monkeypatch.context() as patch:
        patch.setattr(np, "empty", refuse)
        with pytest.raises(UserError, match=r"3 images of 1024 × 1024 pixels take 0\.0 GiB"):
            source.prepare()
    source.prepare()
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(UserError, match="choose a smaller image_size"):
        source.load()


def test_array_that_was_cut_short_is_decoded_anew(root: Path, decoded: list[str]) -> None:
    expected = load(root)["train"].pixels
    array = next((root / folder.CACHE).glob("train-*.npy"))
    array.write_bytes(array.read_bytes()[:-1])
    decoded.clear()
    assert np.array_equal(load(root)["train"].pixels, expected)
    assert sorted(decoded) == ["a.png", "a.png", "b.png"]


def test_what_a_killed_run_had_begun_is_removed(root: Path) -> None:
    load(root)
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        (root / folder.CACHE / f".train-32-{name}").write_bytes(b"half")
        os.utime(root / folder.CACHE / f".train-32-{name}", (time.time() - age, time.time() - age))
    write(root / "train" / "cat" / "c.png")
    load(root)
    assert [name for name in cached(root) if name.startswith(".")] == [".train-32-new"]  # another machine is at it


def test_linked_folders_count_once_and_loops_end(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "c.png")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "more again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "train" / "cat")
    names = load(root)["train"].names
    assert names == ["train/cat/a.png", "train/cat/b.png", "train/cat/more/deep/c.png", "train/dog/a.png"]


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/nested"])
def test_folder_without_permission_is_named(root: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (root / "train" / "cat" / "nested").mkdir()
    scandir, listdir = os.scandir, os.listdir

    def refuse(path: Any) -> None:
        if str(path) == str(root / place):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: refuse(path) or listdir(path))
    with pytest.raises(UserError, match=f"{root / place} cannot be read: Permission denied"):
        _ = ImageFolder(str(root)).classes


def test_class_whose_name_is_no_text_is_refused(root: Path) -> None:
    write(root / "train" / os.fsdecode(b"caf\xe9") / "a.png")
    with pytest.raises(UserError, match="names are not UTF-8"):
        _ = ImageFolder(str(root)).classes


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog", "cat"]])
def test_classes_that_tell_nothing_apart_are_refused(root: Path, classes: list[str]) -> None:
    with pytest.raises(UserError, match=r"the classes are cat.*; name at least two, each once"):
        _ = ImageFolder(str(root), classes=classes).classes


def test_root_may_begin_with_the_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    assert ImageFolder("~/images").classes == ("cat", "dog")


def remove_all(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat", "dog"], "has no folder train/"),
        (["train", "test/cat"], "has no class folders"),
        (["train/cat"], "has only the class folder 'cat'"),
        (["train/cat", "train/dog/nested"], "train has class folders without images: cat, dog"),
    ],
)
def test_wrong_layout_is_told_in_one_line(root: Path, folders: list[str], message: str) -> None:
    remove_all(root)
    for name in folders:
        (root / name).mkdir(parents=True)
    with pytest.raises(UserError, match=message) as refusal:
        _ = ImageFolder(str(root)).classes
    assert "\n" not in str(refusal.value)


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        _ = ImageFolder(str(tmp_path / "nowhere")).classes


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_train_lacks_is_named(root: Path, split: str) -> None:
    write(root / split / "horse" / "a.png")
    with pytest.raises(UserError, match=f"{split} has classes that are not in train: horse"):
        _ = ImageFolder(str(root)).classes
    with pytest.raises(UserError, match=f"{split} has classes that are not in the list cat, dog: horse"):
        _ = ImageFolder(str(root), classes=["cat", "dog"]).classes


def test_class_in_other_characters_of_unicode_is_named(root: Path) -> None:
    write(root / "train" / "caf\N{LATIN SMALL LETTER E WITH ACUTE}" / "a.png")
    write(root / "val" / "cafe\N{COMBINING ACUTE ACCENT}" / "a.png")
    with pytest.raises(
        UserError, match=r"rename café as in train, where the same letters are other Unicode characters"
    ):
        _ = ImageFolder(str(root)).classes


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_split_that_is_a_link_to_nowhere_is_not_taken_for_absent(root: Path, split: str) -> None:
    shutil.rmtree(root / split, ignore_errors=True)
    (root / split).symlink_to("unmounted")
    with pytest.raises(UserError, match=f"has links that lead nowhere: {split}; mend or remove"):
        _ = ImageFolder(str(root), classes=["cat", "dog"]).classes


def test_class_that_is_a_link_to_nowhere_is_named(root: Path) -> None:
    (root / "train" / ".#notes").symlink_to("an editor's")
    assert ImageFolder(str(root)).classes == ("cat", "dog")
    (root / "train" / "horse").symlink_to("unmounted")
    with pytest.raises(UserError, match=r"train has links that lead nowhere: horse; mend or remove"):
        _ = ImageFolder(str(root)).classes


def test_root_that_is_no_text_is_refused(root: Path) -> None:
    """It would be written to config.yaml and to TensorBoard's files."""
    other = root.rename(os.fsdecode(os.fsencode(root) + b"\xfc"))
    with pytest.raises(UserError, match=r"is not UTF-8; rename its folders"):
        _ = ImageFolder(str(other)).classes


def test_empty_test_split_is_an_error(root: Path) -> None:
    (root / "val").mkdir()
    with pytest.raises(UserError, match="val has no class folders"):
        _ = ImageFolder(str(root)).classes


def test_checks_decode_nothing(root: Path, decoded: list[str]) -> None:
    assert ImageFolder(str(root)).classes == ("cat", "dog")
    assert decoded == []
    assert not (root / folder.CACHE).exists()


def test_image_size_must_be_positive() -> None:
    with pytest.raises(UserError, match="image_size is 0"):
        ImageFolder("anywhere", 0)


def test_processes_of_a_machine_decode_once(root: Path, decoded: list[str]) -> None:
    """Threads with sources of their own meet at the same lock as processes do."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: ImageFolder(str(root)).prepare(), range(4)))
    assert sorted(decoded) == ["a.png", "a.png", "a.png", "b.png"]


def test_a_photograph_is_not_copied_before_it_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upright one in RGB takes its memory once."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "copy", lambda image: pytest.fail("copied"))
    pixels, failed = image_files.decode_all([tmp_path / "a.jpg"], 32, "one")
    assert failed == []
    assert pixels[0, 0].min() > 250
