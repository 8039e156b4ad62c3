"""One click: every notebook has the badge and the bootstrap cell, and the cell does what it says where dealkit is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import colab  # noqa: E402  (a script beside the notebooks, not a package)

REPO, VERSION = colab.project()
CELL = colab.BOOTSTRAP.format(repo=REPO, version=VERSION)
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="this machine has no git")


# --- badge and cell are the same everywhere ---------------------------------------------------------------------------

@pytest.mark.parametrize("path", colab.notebooks(), ids=lambda path: str(path.relative_to(ROOT / "notebooks")))
def test_badge_and_bootstrap(path):
    notebook = nbformat.read(path, as_version=4)
    badges = colab.BADGE.findall("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    assert badges == [colab.badge(REPO, path.relative_to(ROOT))], "run: make colab"
    assert colab.BADGE.search(notebook.cells[0].source), "the badge stands in the first cell"
    assert next(cell for cell in notebook.cells if cell.cell_type == "code").source == CELL, "run: make colab"


def test_the_cell_is_short():
    assert len(CELL.splitlines()) <= 12 and max(map(len, CELL.splitlines())) <= 120


def strays(folder: Path, repo: str, names: set[str]) -> list[str]:
    """Addresses of a repository that has one of `names` but is not `repo`, in the text files of a folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in colab.TEXT and not {".git", ".venv", "build"} & set(path.parts):
            addresses = re.finditer(colab.BEFORE + r"([\w.-]+/[\w-]+)", path.read_text(encoding="utf-8"))
            found += [f"{path.name}: {a.group()}" for a in addresses
                      if a.group(2).split("/")[1] in names and a.group(2) != repo]
    return found


def test_no_address_leads_astray():
    files = "\n".join(path.read_text(encoding="utf-8") for path in colab.files() if path != Path(__file__))
    addresses = {match.group(2) for match in re.finditer(colab.BEFORE + r"([\w.-]+/[\w-]+)", files)}
    assert REPO in addresses
    assert not {address for address in addresses if address.endswith("/dealkit")} - {REPO}


def test_moving_to_another_repository_and_back(tmp_path):
    """`make colab REPO=...` finds every address, in every kind of file; moving back restores every byte."""
    heavy = shutil.ignore_patterns(".git", ".venv", "build", "*.safetensors", "__pycache__", "*_cache", "test_colab.py")
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=heavy))
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    move = [sys.executable, "-B", str(copy / "notebooks" / "colab.py"), "--repo"]
    subprocess.run([*move, "somebody/deal-course"], check=True, capture_output=True)
    name = REPO.split("/")[1]
    assert not strays(copy, "somebody/deal-course", {name, "deal-course"})
    cell = nbformat.read(copy / "notebooks" / "00_tour.ipynb", as_version=4).cells
    assert any("git+https://github.com/somebody/deal-course@v" in c.source for c in cell)
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert {"README.md", "pyproject.toml", "00_tour.ipynb"} <= {path.name for path in changed}
    subprocess.run([*move, REPO], check=True, capture_output=True)
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
    wrong = subprocess.run([*move, "no-slash"], capture_output=True, text=True)
    assert wrong.returncode and "owner/name" in wrong.stderr


# --- what the cell decides --------------------------------------------------------------------------------------------

@pytest.fixture
def bootstrap(monkeypatch, capsys):
    """Run the cell in a pretended environment: version of dealkit found, whether it can be imported, what pip answers."""
    def run(dealkit: str | None, importable: bool, returncode: int = 0, stderr: str = ""):
        real, calls = importlib.metadata.distributions, []

        def distributions(name):
            if name == "dealkit":
                return [type("D", (), {"version": dealkit})] if dealkit else []
            return [type("D", (), {"version": "2.9.0+cu126"})] if name == "torch" else real(name=name)

        def pip(command, **kwargs):
            calls.append(command)
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(importlib.metadata, "distributions", distributions)
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: type("S", (), {"origin": "dealkit/__init__.py"}) if importable else None)
        monkeypatch.setattr(subprocess, "run", pip)
        exec(CELL, {})
        return calls, capsys.readouterr().out
    return run


@pytest.mark.parametrize("version", [VERSION, None], ids=["installed", "a checkout that is not installed"])
def test_it_does_nothing_where_dealkit_is(bootstrap, version):
    calls, said = bootstrap(version, importable=True)
    assert calls == [] and "nothing was installed" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("version, importable", [(None, False), ("0.0.1", True), (VERSION, False)],
                         ids=["not there", "another version", "its files are gone"])
def test_it_installs_the_tag_and_keeps_what_is_loaded(bootstrap, version, importable):
    """An import that works is not enough: the version counts."""
    (command,), said = bootstrap(version, importable)
    assert command[-1] == f"dealkit @ git+https://github.com/{REPO}@v{VERSION}"
    numpy = importlib.metadata.version("numpy")
    assert "torch==2.9.0+cu126" in command and f"numpy=={numpy}" in command and "--upgrade" not in command
    assert said.startswith("Installed dealkit") and "kept torch==2.9.0+cu126" in said and len(said.splitlines()) == 1


def test_a_failure_says_what_to_do(bootstrap):
    with pytest.raises(RuntimeError, match="connect to the network, then run this cell again.*no route"):
        bootstrap(None, importable=False, returncode=1, stderr="no route to host")


# --- really, from git, in an environment without dealkit, in an empty folder ------------------------------------------

@pytest.fixture(scope="module")
def colab_like(tmp_path_factory):
    """An environment that has all of dealkit's requirements but not dealkit, and a git server of this working tree."""
    folder = tmp_path_factory.mktemp("colab")
    served = Path(shutil.copytree(ROOT, folder / "served", ignore=shutil.ignore_patterns(
        ".git", ".venv", "build", "__pycache__", "*_cache", "tests", "notebooks")))
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "served"], ["tag", f"v{VERSION}"]):
        subprocess.run([*GIT, *command], cwd=served, check=True)
    venv.create(folder / "env", symlinks=os.name != "nt")
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          check=True, capture_output=True, text=True).stdout.strip()
    # Packages beside this one, but not its links: the .pth file of an editable dealkit is not followed from here.
    Path(site, "there_already.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    (folder / "empty").mkdir()
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_", "PIP_"))}
    variables |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                  "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": f"https://github.com/{REPO}",
                  "GIT_CONFIG_KEY_0": f"url.{served.as_uri()}.insteadOf", "CUDA_VISIBLE_DEVICES": "",
                  # a home that takes no file, not even from root, where the system has such a place
                  "HOME": "/proc" if os.path.isdir("/proc/self") else str(folder / "empty")}
    return python, folder / "empty", variables


FIRST_HEATMAP = """
import json, sys
for source in json.load(sys.stdin):
    exec(source)
import dealkit, torch
from dealkit.paths import data_path
print(json.dumps([dealkit.__file__, str(data_path()), torch.__version__]))
"""


@needs_git
@pytest.mark.slow
def test_without_network_it_says_so(colab_like):
    python, empty, variables = colab_like
    done = subprocess.run([str(python), "-c", CELL], cwd=empty, capture_output=True, text=True,
                          env=variables | {"GIT_CONFIG_KEY_0": f"url.{(empty / 'nowhere').as_uri()}.insteadOf"})
    assert done.returncode and "RuntimeError: No dealkit: connect to the network" in done.stderr


@needs_git
@pytest.mark.slow
def test_from_an_empty_folder_to_the_first_heatmap(colab_like):
    """Notebook 00 up to its first maps: dealkit comes through git, with its data; what was there stays as it was."""
    python, empty, variables = colab_like
    cells = [cell.source for cell in nbformat.read(ROOT / "notebooks" / "00_tour.ipynb", as_version=4).cells
             if cell.cell_type == "code"]
    last = next(i for i, source in enumerate(cells) if "map_grid(" in source)
    done = subprocess.run([str(python), "-c", FIRST_HEATMAP], cwd=empty, capture_output=True, text=True, env=variables,
                          input=json.dumps(cells[:last + 1]))
    assert done.returncode == 0, done.stderr
    package, data, torch_version = json.loads(done.stdout.splitlines()[-1])
    assert Path(package).is_relative_to(empty.parent) and Path(data).is_relative_to(empty.parent)
    assert torch_version == torch.__version__
    assert f"Installed dealkit {VERSION} with its data, and kept torch==" in done.stdout
    assert list(empty.iterdir()) == []


# --- the script that runs all of them ---------------------------------------------------------------------------------

def test_versions_are_read_from_a_freeze(tmp_path):
    """As Colab publishes them: plain pins, local builds, and wheels by address; other packages are left out."""
    import colab_like

    freeze = tmp_path / "freeze.txt"
    freeze.write_text("absl-py==1.4.0\nnumpy==2.0.2\nhuggingface-hub==1.2.3\nscikit-image==0.25.2\n"
                      "torch @ https://example.org/whl/cu126/torch-2.8.0%2Bcu126-cp312-cp312-manylinux_2_28_x86_64.whl\n"
                      "torchvision==0.23.0+cu126\n", encoding="utf-8")
    assert sorted(colab_like.from_freeze(freeze)) == ["huggingface-hub==1.2.3", "numpy==2.0.2", "scikit-image==0.25.2",
                                                      "torch==2.8.0", "torchvision==0.23.0"]
    freeze.write_text("numpy==2.0.2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no version of torch"):
        colab_like.from_freeze(freeze)
