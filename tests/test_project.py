"""The project's own files agree: Makefile, pyproject.toml, constraints.txt, LICENSE, README and .ci/run."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]
CONSTRAINTS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
]


def make(*args: str) -> str:
    """Run GNU make in the checkout, as if not inside another make, and return what it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *args], cwd=ROOT, env=env, text=True, capture_output=True, check=True).stdout


def tracked_files() -> list[Path]:
    """List what git tracks, less what is deleted."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip(f"git does not list the checkout's files: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_target_lists_every_target() -> None:
    listed = [line.split(maxsplit=1) for line in make().splitlines()]
    assert [target for target, _ in listed] == TARGETS
    assert make("help") == make()


def test_every_target_is_phony() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony is not None
    assert phony[1].split() == TARGETS


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_constraint_satisfies_range(requirement: Requirement) -> None:
    pins = {canonicalize_name(name): version for name, _, version in (c.partition("==") for c in CONSTRAINTS)}
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_constraints_are_versions_only() -> None:
    """No host, hash, path or option; each package once."""
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in CONSTRAINTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_lightning_is_excluded(version: str) -> None:
    lightning = next(requirement for requirement in REQUIREMENTS if requirement.name == "lightning")
    assert not lightning.specifier.contains(version)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    script = ROOT / ".ci/run"
    assert re.search(r"make quickstart(?![\w-])", readme)
    assert re.search(r"make test(?![\w-])", readme)
    assert re.search(r'^make test VENV="\$tmp/venv"$', script.read_text(), re.MULTILINE)
    assert os.access(script, os.X_OK)


def test_make_targets_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= set(TARGETS)


def test_files_name_no_private_path_and_no_package_index() -> None:
    """What holds on one machine only has no place in a file that others get."""
    private = re.compile(
        rf"(?<![\w.])(?:/(?:home/\w|Users/\w|root/)|{re.escape(str(ROOT))}/)|index[-_]url|find[-_]links",
        re.IGNORECASE,
    )
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in tracked_files()
        if b"\0" not in path.read_bytes() and (match := private.search(path.read_text(errors="replace")))
    }
    assert found == {}


def test_no_file_is_a_product() -> None:
    """What a command leaves is larger than what people write, and grows the history for good."""
    assert {path.name for path in tracked_files() if path.stat().st_size > 2**19} == set()


def test_license_is_mit() -> None:
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 thaw contributors\n")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="needs processes of tests beside each other")
def test_processes_of_tests_leave_each_other_a_core() -> None:
    assert torch.get_num_threads() == 1


def test_rooms_import_each_other_as_the_readme_says() -> None:
    apart = {"model": {"cli", "data"}, "data": {"cli", "model"}}
    for path in (ROOT / "src").rglob("*.py"):
        room = path.relative_to(ROOT / "src").parts[0]
        found = set(re.findall(r"^\s*(?:(?:from|import) src\.|from src import )(\w+)", path.read_text(), re.MULTILINE))
        assert not found & apart.get(room, {"cli"}), path
