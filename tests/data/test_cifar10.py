"""`CIFAR10` on a made-up archive in the official layout, served on the loopback interface."""

import copyreg
import hashlib
import io
import pickle
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server import Server, serving
from torchvision.datasets import CIFAR10 as Archive

from src.data.sources import CIFAR10
from src.errors import UserError

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def old_pickle(value: object) -> bytes:
    """Pickle as the NumPy of 2009 did, which wrote a dtype's `align` as 0 and `copy` as 1."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    state = np.dtype("u1").__reduce__()[2]
    pickler.dispatch_table[type(np.dtype("u1"))] = lambda dtype: (np.dtype, ("u1", 0, 1), state)
    pickler.dump(value)
    return buffer.getvalue()


@pytest.fixture
def batches() -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    names = [*TRAIN, "test_batch"]
    pixels = rng.integers(0, 256, (len(names), 4, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, (len(names), 4)).tolist()
    return {name: {"data": pixels[i], "labels": labels[i]} for i, name in enumerate(names)}


@pytest.fixture
def archive(batches: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Make the archive and tell torchvision its checksums."""
    files = {name: old_pickle(batch) for name, batch in batches.items()}
    files["batches.meta"] = old_pickle({"label_names": list(CIFAR10().classes)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{Archive.base_folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    monkeypatch.setattr(Archive, "tgz_md5", md5(content))
    monkeypatch.setattr(Archive, "train_list", [[name, md5(files[name])] for name in TRAIN])
    monkeypatch.setattr(Archive, "test_list", [["test_batch", md5(files["test_batch"])]])
    monkeypatch.setattr(Archive, "meta", {**Archive.meta, "md5": md5(files["batches.meta"])})
    return content


@pytest.fixture
def server(archive: bytes) -> Iterator[Server]:
    with serving(archive, Archive.filename) as server:
        yield server


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)


def test_whole_archive_loads_in_the_order_of_the_files(
    server: Server, tmp_path: Path, batches: dict[str, dict[str, Any]]
) -> None:
    source = CIFAR10(str(tmp_path), server.url)
    source.prepare()
    images = source.load()
    assert images.keys() == {"train", "test"}
    for split, names in {"train": TRAIN, "test": ["test_batch"]}.items():
        pixels, labels = images[split].pixels, images[split].labels
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.int64
        assert pixels.flags.c_contiguous
        expected = np.concatenate([batches[name]["data"] for name in names]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(pixels, expected)
        assert labels.tolist() == [label for name in names for label in batches[name]["labels"]]
        assert images[split].names is None


def test_complaint_of_some_numpy_versions_is_not_passed_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CIFAR10(str(tmp_path), server.url)
    source.prepare()
    unpickle = pickle.load

    def complain(file: Any, **options: Any) -> object:
        message = "dtype(): align should be passed as Python or NumPy boolean but got `align=0`."
        warnings.warn(message, np.exceptions.VisibleDeprecationWarning, stacklevel=2)
        return unpickle(file, **options)

    monkeypatch.setattr(pickle, "load", complain)
    assert len(source.load()["test"]) == 4


def test_second_prepare_asks_for_nothing(server: Server, tmp_path: Path) -> None:
    CIFAR10(str(tmp_path), server.url).prepare()
    (tmp_path / Archive.filename).unlink()  # as one does to save space
    CIFAR10(str(tmp_path), server.url).prepare()
    assert len(server.ranges_asked) == 1


def test_official_address_is_the_default(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Archive, "url", server.url)
    source = CIFAR10(str(tmp_path))
    source.prepare()
    assert len(source.load()["train"]) == 20


@pytest.mark.parametrize("mine", ["photo.jpg", "cat/photo.jpg", "train/cat/photo.jpg", "test/cat/photo.jpg"])
def test_it_is_not_downloaded_among_other_images_unless_that_has_begun(
    server: Server, tmp_path: Path, mine: str
) -> None:
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).touch()
    with pytest.raises(UserError, match=r"holds images, and CIFAR-10 would be downloaded to it.*with/folder\.yaml"):
        CIFAR10(str(tmp_path), server.url).prepare()
    (tmp_path / f"{Archive.filename}.part").touch()
    CIFAR10(str(tmp_path), server.url).prepare()
    assert len(server.ranges_asked) == 1


@pytest.mark.parametrize(("root", "folder"), [("mine", "pets/train"), ("data", "pets/train"), ("data", "holiday")])
def test_other_images_further_down_are_no_hindrance(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / root / folder).mkdir(parents=True)
    (tmp_path / root / folder / "photo.jpg").touch()
    CIFAR10(root, server.url).prepare()


def test_cut_download_continues_when_the_server_is_whole(server: Server, tmp_path: Path, archive: bytes) -> None:
    half = len(archive) // 2
    (tmp_path / f"{Archive.filename}.part").write_bytes(archive[:half])
    server.cut = 0
    with pytest.raises(UserError, match="cut off"):
        CIFAR10(str(tmp_path), server.url).prepare()
    assert not (tmp_path / Archive.base_folder).exists()
    server.cut = None
    source = CIFAR10(str(tmp_path), server.url)
    source.prepare()
    assert server.ranges_asked == [f"bytes={half}-"] * 2
    assert len(source.load()["test"]) == 4


@pytest.mark.usefixtures("no_pickle")
def test_tampered_archive_is_refused_before_it_is_opened(server: Server, tmp_path: Path) -> None:
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    with pytest.raises(UserError, match="wrong checksum"):
        CIFAR10(str(tmp_path), server.url).prepare()
    assert not any(path.is_dir() or path.suffix in (".gz", ".part") for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="damaged or missing"):
        CIFAR10(str(tmp_path), server.url).load()


@pytest.mark.usefixtures("no_pickle")
def test_archive_with_a_wrong_member_leaves_no_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Archive, "test_list", [["test_batch", md5(b"something else")]])
    with pytest.raises(UserError, match="holds a damaged test_batch"):
        CIFAR10(str(tmp_path), server.url).prepare()
    assert [path.name for path in tmp_path.iterdir()] == [Archive.filename]


@pytest.mark.usefixtures("archive")
def test_archive_that_cannot_be_unpacked_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("src.data.sources.cifar10.TemporaryDirectory", refuse)
    with pytest.raises(UserError, match=r"cannot be unpacked there: Permission denied.*init_args.root"):
        CIFAR10(str(tmp_path), server.url).prepare()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_tampered_file_is_refused_and_mended_from_the_archive(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = CIFAR10(str(tmp_path), server.url)
    source.prepare()
    tampered = tmp_path / Archive.base_folder / name
    tampered.write_bytes(b"tampered")
    unpickled = []
    unpickle = pickle.load

    def record(file: Any, **options: Any) -> object:
        unpickled.append(Path(file.name))
        return unpickle(file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pickle, "load", record)
        with pytest.raises(UserError, match=f"{name} is damaged or missing"):
            source.load()
    assert tampered not in unpickled
    source.prepare()
    assert len(source.load()["train"]) == 20
    assert len(server.ranges_asked) == 1


def test_damaged_files_without_network_are_named(server: Server, tmp_path: Path) -> None:
    source = CIFAR10(str(tmp_path), server.url)
    source.prepare()
    (tmp_path / Archive.filename).unlink()
    (tmp_path / Archive.base_folder / "data_batch_2").write_bytes(b"tampered")
    offline = CIFAR10(str(tmp_path), (tmp_path / "nowhere.tar.gz").as_uri())
    with pytest.raises(UserError, match=r"data_batch_2 is damaged .*sample\.yaml.*folder\.yaml"):
        offline.prepare()


def test_many_at_once_download_once(server: Server, tmp_path: Path) -> None:
    sources = [CIFAR10(str(tmp_path), server.url) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(CIFAR10.prepare, sources))
    assert len(server.ranges_asked) == 1
    assert {len(source.load()["train"]) for source in sources} == {20}
    assert sorted(path.name for path in tmp_path.iterdir()) == [Archive.base_folder, Archive.filename]


@pytest.mark.usefixtures("no_pickle")
def test_classes_need_no_files() -> None:
    assert CIFAR10("nowhere").classes[::9] == ("airplane", "truck")
