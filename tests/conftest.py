"""Make every test independent of where it is started, of the network and of the machine's settings."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

_THIN = ((8, 2), (8, 2), (16, 3), (16, 3), (32, 3))  # (channels, convolutions) of each block
WEIGHTS = "hub/checkpoints/vgg16_features-amdegroot-88682ab5.pth"

# Before anything imports torch or matplotlib; subprocesses inherit it.
for name in ("THAW_DATA", "TORCH_HOME"):
    if os.environ.get(name):
        os.environ[name] = str(Path(os.environ[name]).resolve())  # still right after a test's chdir
for name in ("http_proxy", "https_proxy"):
    os.environ[name] = "http://127.0.0.1:9"  # nobody listens there: what needs the network fails at once
os.environ["no_proxy"] = "127.0.0.1,localhost"
# Small networks: more threads only get in each other's way, and so do those of several processes of tests. These would
# inherit what the process that started them has set below.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# A shell has what it runs in the background ignore Ctrl-C, and so would all that is started from here.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("MPLBACKEND", None)  # the code must do without a display by itself


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have locks, and whatever else goes to the machine's temporary folder, go with the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare most tests the drawing, a quarter of a small training's time: each picture is a dot.

    What the tests of a file share is made before this, and drawn; so is what a test marked `pictures` makes.
    """
    if request.node.get_closest_marker("pictures") is None:
        dot = Image.new("RGB", (1, 1))
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: dot.save(path, "PNG"))


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    """Train VGG16 with few channels, which takes and keeps a hundredth; its layers, and all around them, are the same.

    Processes that a test starts have the whole one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.model.vgg.BLOCKS", _THIN)
        patch.setattr("src.model.classifier.FEATURES", _THIN[-1][0])
        yield


def missing_data() -> str | None:
    """Say what the tests marked `data` lack, or None."""
    data, weights = os.environ.get("THAW_DATA"), os.environ.get("TORCH_HOME")
    if not data or not weights:
        return "needs THAW_DATA (holding cifar10-jpeg/) and TORCH_HOME (holding the weights)"
    for split in ("train", "test"):
        folder = Path(data, "cifar10-jpeg", split)
        if next(folder.glob("*/*.jpg"), None) is None:
            return f"no images in {folder}/<class>/ (THAW_DATA)"
    if not Path(weights, WEIGHTS).is_file():
        return f"no weights at {Path(weights, WEIGHTS)} (TORCH_HOME)"
    return None


# Files that take longest, to be begun first: at the end one process would be busy with one of them alone.
_LONGEST = [
    "test_resume.py", "test_cli.py", "test_processes.py", "test_errors.py", "test_replay.py", "test_configs.py",
    "test_export.py", "test_distillation.py", "test_fused_conv.py", "test_unfreezing.py", "test_classifier.py",
    "test_int8.py", "test_feature_cache.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
    reason = missing_data()
    for item in items:
        if reason and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=reason))
