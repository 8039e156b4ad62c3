"""Keep what makes the notebooks run on Colab in step: the badge, and the cell that installs dealkit.

    python notebooks/colab.py                     write both into every notebook, from pyproject.toml
    python notebooks/colab.py --repo owner/name   first move every address of this repository to owner/name

The address comes from the Homepage in pyproject.toml and the tag from its version, so a fork changes one line.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from pathlib import Path

import nbformat
from strip import write

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
# What stands before owner/name in the addresses that lead to a repository: GitHub, Colab, Binder, Codespaces.
BEFORE = r"(github\.com/|\.com/github/|githubusercontent\.com/|codespaces\.new/|mybinder\.org/v2/gh/)"
TEXT = {".md", ".py", ".toml", ".yml", ".yaml", ".json", ".cff", ".ipynb", ".txt", ""}

# It looks at versions, not only at whether an import works, and it never replaces what a running kernel has loaded.
BOOTSTRAP = '''\
import importlib.metadata, importlib.util, subprocess, sys
version = lambda name: next((found.version for found in importlib.metadata.distributions(name=name)), None)
if getattr(importlib.util.find_spec("dealkit"), "origin", None) and version("dealkit") in (None, "{version}"):
    print("dealkit {version} is here already: nothing was installed.")
else:  # Colab and the like: torch, torchvision and numpy stay as they are; pip adds what is missing or too old
    keep = [f"{{name}}=={{version(name)}}" for name in ("torch", "torchvision", "numpy") if version(name)]
    source = "dealkit @ git+https://github.com/{repo}@v{version}"
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *keep, source], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"No dealkit: connect to the network, then run this cell again. {{done.stderr[-900:]}}")
    importlib.invalidate_caches()
    print("Installed dealkit", version("dealkit"), "with its data, and kept", *keep)'''


def project() -> tuple[str, str]:
    """Owner/name and version, from pyproject.toml."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table["urls"]["Homepage"].removeprefix("https://github.com/"), table["version"]


def badge(repo: str, path: Path) -> str:
    """The badge that opens a notebook in Colab; path: relative to the repository."""
    colab = "https://colab.research.google.com"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{repo}/blob/main/{path.as_posix()})"


def files() -> list[Path]:
    """The text files of the repository, without what was built or installed."""
    hidden = {".git", ".venv", "build", "__pycache__", ".ipynb_checkpoints", ".pytest_cache"}
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in hidden]
        found += [Path(folder, name) for name in names if Path(name).suffix in TEXT]
    return sorted(found)


def notebooks() -> list[Path]:
    """Every notebook: the numbered ones, exercises, solutions and snippets."""
    return sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def move(old: str, new: str) -> int:
    """Replace the owner and name in every address of this repository; the number of files that changed."""
    pattern, changed = re.compile(BEFORE + re.escape(old) + r"(?![\w-])"), 0
    for path in files():
        before = path.read_text(encoding="utf-8")
        after = pattern.sub(rf"\g<1>{new}", before)
        if after != before:
            path.write_text(after, encoding="utf-8", newline="\n")
            changed += 1
    return changed


def dress(path: Path, repo: str, version: str) -> bool:
    """Write badge and bootstrap cell into a notebook; whether anything changed."""
    notebook = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    first, link = notebook.cells[0], badge(repo, path.relative_to(ROOT))
    first.source = BADGE.sub(link, first.source) if BADGE.search(first.source) else f"{first.source}\n\n{link}"
    next(cell for cell in notebook.cells if cell.cell_type == "code").source = BOOTSTRAP.format(
        repo=repo, version=version)
    if nbformat.writes(notebook) == before:
        return False
    write(notebook, path)
    return True


def main() -> None:
    """Move the addresses where asked to, then dress every notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", metavar="OWNER/NAME", help="where the repository is to be found from now on")
    asked = parser.parse_args().repo
    if asked:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", asked):
            parser.error(f"{asked!r} is not of the form owner/name")
        print(f"{move(project()[0], asked)} files now lead to {asked}")
    changed = [path for path in notebooks() if dress(path, *project())]
    print(f"{len(changed)} of {len(notebooks())} notebooks changed" + "".join(f"\n  {path.name}" for path in changed))


if __name__ == "__main__":
    main()
