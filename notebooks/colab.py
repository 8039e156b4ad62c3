"""Keep what makes the notebooks run on Colab in step: the badge, and the cell that installs dealkit.

    python notebooks/colab.py                     write both into every notebook, from pyproject.toml
    python notebooks/colab.py --repo owner/name   first move every address of this repository to owner/name

The address comes from the Homepage in pyproject.toml and the tag from its version, so a fork changes one line.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
from strip import write

ROOT = Path(__file__).resolve().parents[1]
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
# What stands before owner/name in the addresses that lead to a repository: GitHub, Colab, Binder, Codespaces.
BEFORE = r"(github\.com/|\.com/github/|githubusercontent\.com/|codespaces\.new/|mybinder\.org/v2/gh/)"
NAME = r"[\w-]+/[\w-]+(?:\.[\w-]+)*"                           # owner/name; a full stop at the end is not of the name
TEXT = {".md", ".py", ".toml", ".yml", ".yaml", ".json", ".cff", ".ipynb", ".txt"}
OURS = re.compile(r"((exercises/|solutions/)?\d\d_[a-z_]+|snippets/snippets)\.ipynb")    # not 00_tour-Copy1.ipynb

# It looks at versions, not only at whether an import works, and it never replaces what a running kernel has loaded.
BOOTSTRAP = '''\
import importlib.metadata, importlib.util, os, subprocess, sys
version = lambda name: next((found.version for found in importlib.metadata.distributions(name=name)), None)
if getattr(importlib.util.find_spec("dealkit"), "origin", None) and version("dealkit") == "{version}":
    print("dealkit {version} is here already: nothing was installed.")
elif any(os.path.exists(f"{{folder}}/dealkit/paths.py") for folder in (".", "..", "../..")):
    raise RuntimeError("This is a checkout, but not its Python: `make .venv/ready`, then choose the kernel of .venv")
else:  # Colab and the like: torch, torchvision and numpy stay as they are; pip adds what is missing or too old
    keep = [f"{{name}}=={{version(name)}}" for name in ("torch", "torchvision", "numpy") if version(name)]
    pip = [sys.executable, "-m", "pip", "install", *keep, "dealkit @ git+https://github.com/{repo}@v{version}"]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert version("dealkit") == "{version}", f"No dealkit. Network? git? torch 2.4? Restart? {{done.stderr[-900:]}}"
    print("Installed dealkit", version("dealkit"), "with its data, and kept", *keep)'''


def project() -> tuple[str, str]:
    """Owner/name and version, from pyproject.toml."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table["urls"]["Homepage"].removeprefix("https://github.com/").strip("/"), table["version"]


def badge(repo: str, path: Path) -> str:
    """The badge that opens a notebook in Colab; path: relative to the repository."""
    colab = "https://colab.research.google.com"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{repo}/blob/main/{path.as_posix()})"


def files() -> list[Path]:
    """The text files of the repository, pyproject.toml last: it remembers the old name until all others have moved."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"],
                            capture_output=True, text=True)
    hidden = {".git", ".venv", "build", "__pycache__", ".ipynb_checkpoints", ".pytest_cache"}
    paths = ([ROOT / line for line in listed.stdout.splitlines()] if listed.returncode == 0 else
             [path for path in ROOT.rglob("*") if not hidden & set(path.relative_to(ROOT).parts)])
    ours = notebooks()
    return sorted((path for path in paths if path.suffix in TEXT and path.is_file()
                   and (path.suffix != ".ipynb" or path in ours)),
                  key=lambda path: (path == ROOT / "pyproject.toml", path))


def notebooks() -> list[Path]:
    """Our notebooks: the numbered ones, exercises, solutions and snippets, and not what a reader keeps beside them."""
    folder = ROOT / "notebooks"
    return sorted(path for path in folder.rglob("*.ipynb") if OURS.fullmatch(path.relative_to(folder).as_posix()))


def addresses(text: str) -> set[str]:
    """Every owner/name that an address in a text leads to."""
    return {match.group(2) for match in re.finditer(f"{BEFORE}({NAME})", text)}


def move(old: str, new: str) -> int:
    """Replace the owner and name in every address of this repository; the number of files that changed."""
    pattern, changed = re.compile(BEFORE + re.escape(old) + r"(?![\w-]|\.\w)"), 0
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
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    if not cell.source.startswith("import importlib"):
        raise SystemExit(f"The first code cell of {path.name} is not the one that installs dealkit: copy it there "
                         "from another notebook. Nothing was written to this one.")
    cell.source = BOOTSTRAP.format(repo=repo, version=version)
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
        if not re.fullmatch(NAME, asked):
            parser.error(f"{asked!r} is not of the form owner/name")
        print(f"{move(project()[0], asked)} files now lead to {asked}")
    changed = [path for path in notebooks() if dress(path, *project())]
    print(f"{len(notebooks())} notebooks have their badge and first cell"
          + (f", {len(changed)} of them written now" if changed else ""))


if __name__ == "__main__":
    main()
