"""The lists of packages agree, the wheel carries the data, and make works where it is called."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dealkit.paths import data_path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINS = [line for line in LINES if line and not line.startswith("#")]
# Where the name that is imported is not the name that is installed.
DISTRIBUTION = {"open_clip": "open-clip-torch", "yaml": "pyyaml", "PIL": "pillow",
                "skimage": "scikit-image"}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")


def by_name(requirements: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in requirements}


def imported(*folders: str) -> set[str]:
    """Distributions behind the third-party imports in the Python files of some folders."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    ours = {"dealkit"} | {path.stem for folder in folders for path in (ROOT / folder).rglob("*")}
    return {canonicalize_name(DISTRIBUTION.get(name, name)) for name in found - ours - sys.stdlib_module_names}


def test_pins_are_exact_and_portable():
    for text in PINS:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9.]+", text), f"{text!r}: write name==version, for every platform"
    assert [text.lower() for text in PINS] == sorted(text.lower() for text in PINS)


def test_pins_lie_within_the_ranges_of_pyproject():
    ranges = by_name(PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), []))
    pins = by_name(PINS)
    assert pins.keys() == ranges.keys()
    for name, pin in pins.items():
        version = str(pin.specifier).removeprefix("==")
        assert version in ranges[name].specifier, f"requirements.txt has {pin}, pyproject.toml {ranges[name]}"


def test_conda_environment_has_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == PINS + ["-e ."]
    assert conda == ["python" + PROJECT["requires-python"], "pip"]


def test_imports_are_declared():
    core, every = by_name(PROJECT["dependencies"]).keys(), by_name(PINS).keys()
    optional = PROJECT["optional-dependencies"]
    extra = by_name(optional["llm"] + optional["hub"]).keys()          # imported where it is used, with a clear error
    assert imported("dealkit") <= core | extra, "dealkit/ imports what pyproject.toml's dependencies lack"
    assert imported("tests", "notebooks", "data") <= every, "requirements.txt lacks what tests or scripts import"


def test_workflow_covers_the_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert {"run": "make test"} in job["steps"]
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


# --- make -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """What make needs, in a folder whose name has spaces."""
    folder = tmp_path / "a folder  with spaces"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder, *arguments):
    # Without the variables of the make that may have started this test.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, env=clean)


@needs_make
@pytest.mark.parametrize("target, last", [
    (None, ".venv/bin/python notebooks/run.py"),
    ("tutorial", ".venv/bin/python notebooks/run.py"),
    ("test", r".venv/bin/python -m pytest --nbval-lax .* tests notebooks"),
    ("lab", ".venv/bin/python -m jupyterlab .*"),
])
def test_make_uses_relative_paths_only(folder, target, last):
    done = make(folder, "-n", *filter(None, [target]))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(last, lines[-1])
    assert ".venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt" in lines
    assert str(folder) not in done.stdout and folder.name not in done.stdout


@needs_make
def test_make_installs_once_and_again_after_a_move(folder, tmp_path):
    (folder / ".venv").mkdir()
    (folder / ".venv" / "ready").write_text(f"{folder.resolve()}\n")
    assert make(folder, "-n", "tutorial").stdout == ".venv/bin/python notebooks/run.py\n"
    moved = folder.rename(tmp_path / "moved")
    assert "pip install" in make(moved, "-n", "tutorial").stdout


@needs_make
@pytest.mark.parametrize("python", ["false", "no-such-python"])
def test_make_names_the_pythons_it_can_use(folder, python):
    done = make(folder, f"PYTHON={python}", "test")
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13" in done.stdout and "make PYTHON=python3.12 test" in done.stdout
    assert not (folder / ".venv").exists()


@needs_make
def test_make_help_lists_the_targets(folder):
    listed = [line.split()[1] for line in make(folder, "help").stdout.splitlines()]
    assert listed == ["tutorial", "test", "study", "colab", "lab", "clean", "help"]


# --- the package ------------------------------------------------------------------------------------------------------

def test_wheel_carries_the_data(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, str(ROOT)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("dealkit-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    shipped = {path.relative_to(ROOT / "data") for path in (ROOT / "data").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}
    package = tmp_path / "site" / "dealkit"
    assert shipped and shipped <= {path.relative_to(package / "data") for path in (package / "data").rglob("*")}

    spec = importlib.util.spec_from_file_location("installed_paths", package / "paths.py")
    paths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paths)
    assert paths.data_path() == package / "data"
    shutil.rmtree(package / "data")
    (package.parent / "data").mkdir()  # somebody else's folder of that name
    with pytest.raises(FileNotFoundError, match="Install dealkit again"):
        paths.data_path()


def test_data_path_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_path().is_absolute() and data_path() == ROOT / "data"
    assert data_path("birdworld", "vocab.json").is_file()


def test_data_path_of_a_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no data file 'birdworld/vocab.jsn'.*vocab\.json"):
        data_path("birdworld", "vocab.jsn")
    with pytest.raises(FileNotFoundError, match="no data file 'no/such/place'.*birdworld"):
        data_path("no", "such", "place")
    assert data_path("no", "such", must_exist=False) == ROOT / "data" / "no" / "such"
