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


def strays(paths: list[Path], repo: str) -> set[str]:
    """Addresses that lead to another repository of a name that this one has or had."""
    names = {repo.split("/")[1], "dealkit"}
    found = set().union(*(colab.addresses(path.read_text(encoding="utf-8")) for path in paths))
    return {address for address in found if address.split("/")[1].removesuffix(".git") in names and address != repo}


def test_no_address_leads_astray():
    paths = [path for path in colab.files() if path != Path(__file__)]
    assert any(REPO in colab.addresses(path.read_text(encoding="utf-8")) for path in paths)
    assert strays(paths, REPO) == set()


def test_an_address_ends_where_its_name_does():
    text = "(https://github.com/a/b.js), github.com/c/d. And https://github.com/e/f@v1, codespaces.new/g/h?x"
    assert colab.addresses(text) == {"a/b.js", "c/d", "e/f", "g/h"}


@pytest.mark.parametrize("new", ["somebody/deal-course", "alice/deal.kit"])
def test_moving_to_another_repository_and_back(tmp_path, new):
    """`make colab REPO=...` finds every address, in every kind of file; moving back restores every byte, and what a
    reader keeps beside our notebooks stays untouched."""
    heavy = shutil.ignore_patterns(".git", ".venv", "build", "*.safetensors", "__pycache__", "*_cache", "test_colab.py")
    copy = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=heavy))
    (copy / "notebooks" / "mine").mkdir()
    shutil.copy(copy / "notebooks" / "exercises" / "00_tour.ipynb", copy / "notebooks" / "mine" / "my_answers.ipynb")
    shutil.copy(copy / "notebooks" / "exercises" / "00_tour.ipynb", copy / "notebooks" / "exercises" / "00_tour-Copy1.ipynb")
    (copy / ".DS_Store").write_bytes(b"\xff\xfe\x00")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    move = [sys.executable, "-B", str(copy / "notebooks" / "colab.py"), "--repo"]
    subprocess.run([*move, new], check=True, capture_output=True)
    texts = [path for path in before if path.suffix in colab.TEXT and path.name not in ("my_answers.ipynb",
                                                                                        "00_tour-Copy1.ipynb")]
    assert strays(texts, new) == set()
    cells = nbformat.read(copy / "notebooks" / "00_tour.ipynb", as_version=4).cells
    assert any(f"git+https://github.com/{new}@v{VERSION}" in cell.source for cell in cells)
    changed = [path for path, content in before.items() if path.read_bytes() != content]
    assert {"README.md", "pyproject.toml", "00_tour.ipynb"} <= {path.name for path in changed}
    assert not {"my_answers.ipynb", "00_tour-Copy1.ipynb"} & {path.name for path in changed}
    subprocess.run([*move, REPO], check=True, capture_output=True)
    assert [path.name for path, content in before.items() if path.read_bytes() != content] == []
    wrong = subprocess.run([*move, "no-slash"], capture_output=True, text=True)
    assert wrong.returncode and "owner/name" in wrong.stderr


# --- what the cell decides --------------------------------------------------------------------------------------------

@pytest.fixture
def bootstrap(monkeypatch, capsys, tmp_path):
    """Run the cell in a pretended environment: the version of dealkit that is found, whether it can be imported, what
    pip answers and installs, and the folder that the notebook lies in."""
    def run(dealkit: str | None, importable: bool, stderr: str = "", installs: str | None = VERSION, cwd: Path = tmp_path):
        real, calls, found = importlib.metadata.distributions, [], [dealkit]

        def distributions(name):
            if name == "dealkit":
                return [type("D", (), {"version": found[0]})] if found[0] else []
            return [type("D", (), {"version": "2.9.0+cu126"})] if name == "torch" else real(name=name)

        def pip(command, **kwargs):
            calls.append(command)
            found[0] = installs if installs else found[0]
            return subprocess.CompletedProcess(command, 0 if installs else 1, "", stderr)

        monkeypatch.chdir(cwd)
        monkeypatch.setattr(importlib.metadata, "distributions", distributions)
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name: type("S", (), {"origin": "dealkit/__init__.py"}) if importable else None)
        monkeypatch.setattr(subprocess, "run", pip)
        exec(CELL, {})
        return calls, capsys.readouterr().out
    return run


@pytest.mark.parametrize("folder", [".", "notebooks", "notebooks/exercises", "elsewhere"])
def test_it_does_nothing_where_dealkit_is(bootstrap, folder, tmp_path):
    calls, said = bootstrap(VERSION, importable=True, cwd=ROOT / folder if folder != "elsewhere" else tmp_path)
    assert calls == [] and "nothing was installed" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("folder", [".", "notebooks", "notebooks/exercises"])
@pytest.mark.parametrize("version, importable", [(None, False), (None, True), ("0.0.1", True)])
def test_in_a_checkout_with_another_kernel_it_installs_nothing(bootstrap, folder, version, importable):
    """Importable because it lies in the working folder, yet without its packages: no reason to go on."""
    with pytest.raises(RuntimeError, match="choose the kernel of .venv"):
        bootstrap(version, importable, cwd=ROOT / folder)


@pytest.mark.parametrize("version, importable", [(None, False), ("0.0.1", True), (VERSION, False)],
                         ids=["not there", "another version", "its files are gone"])
def test_it_installs_the_tag_and_keeps_what_is_loaded(bootstrap, version, importable):
    """An import that works is not enough: the version counts."""
    (command,), said = bootstrap(version, importable)
    assert command[-1] == f"dealkit @ git+https://github.com/{REPO}@v{VERSION}"
    numpy = importlib.metadata.version("numpy")
    assert "torch==2.9.0+cu126" in command and f"numpy=={numpy}" in command and "--upgrade" not in command
    assert said.startswith(f"Installed dealkit {VERSION}") and "kept torch==2.9.0+cu126" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("version", [None, "0.0.1"], ids=["none", "an older one"])
def test_a_failure_says_what_to_look_at_and_stops(bootstrap, version):
    with pytest.raises(AssertionError, match=r"No dealkit. Network\? git\? torch 2.4\? Restart\? no route"):
        bootstrap(version, importable=False, installs=None, stderr="no route to host")


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
    # The packages that are here, except dealkit: links, since an entry on the path would show its metadata, too.
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "dealkit" not in entry.name and not Path(site, entry.name).exists():
            Path(site, entry.name).symlink_to(entry)
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
    assert done.returncode and "AssertionError: No dealkit. Network? git?" in done.stderr


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
