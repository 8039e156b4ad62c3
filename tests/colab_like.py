"""Run the notebooks as Colab does: packages that are there already, an empty folder, one notebook and nothing else.

    python tests/colab_like.py                           a new environment of the newest versions of what Colab has
    python tests/colab_like.py --freeze pip-freeze.txt   with the versions of a list (Colab publishes its own)
    python tests/colab_like.py --python python3.12 --environment build/colab 00 03

For each notebook, exercises, solutions and snippets included: what an earlier one installed is taken away, the
notebook is put alone into an empty folder, with a home that is new (or cannot be written to), and runs to its end. Its
first cell installs dealkit through git at its tag, from this checkout's last commit; the cell itself is not changed, git
is told where that address leads. Needs packages from an index, git, and a kernel in the environment; a GPU is hidden.
Prints seconds from the start of the kernel to the first heatmap of notebook 00, without the download of packages, which
pip has fetched before. With --no-network a notebook is right when its first cell stops with the words for that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import nbformat
import papermill

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
from colab import notebooks, project  # noqa: E402  (a script beside the notebooks, not a package)

REPO, VERSION = project()
HOME = f"https://github.com/{REPO}"
# What Colab has of dealkit's requirements, and the kernel; it lacks open_clip_torch and captum. Those with a version
# are old on Colab and stay so: its interface is built on them.
COLAB = ["accelerate", "filelock", "huggingface_hub", "ipykernel==6.17.1", "ipython==7.34.0", "ipywidgets==7.7.1",
         "matplotlib", "numpy", "pandas", "pillow", "pooch", "psutil", "safetensors", "scikit-image", "scipy",
         "seaborn", "timm", "torch", "torchvision", "tqdm", "transformers"]


def make_environment(folder: Path, python: str, packages: list[str]) -> Path:
    """A virtual environment with `packages`; its interpreter. One that is there already is taken as it is."""
    interpreter = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *packages], check=True)
    return interpreter.absolute()                                # not resolved: the link is what makes it the venv's


def from_freeze(path: Path) -> list[str]:
    """The packages of `COLAB` at the versions of a `pip freeze`, where one may stand as the address of its wheel."""
    names, pins = {re.split("[=<>]", package)[0].replace("_", "-") for package in COLAB}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # "name==2.8.0+cu126", or "name @ https://.../name-2.8.0%2Bcu126-cp312-cp312-linux_x86_64.whl"
        match = re.match(r"([\w.-]+)(?:==| @ \S*/[\w.]+-)(\d[\w.]*)", line.strip())
        if match and (name := match[1].lower().replace("_", "-")) in names:
            pins[name] = f"{name}=={match[2]}"
    if "torch" not in pins:
        raise SystemExit(f"{path} has no version of torch: is it the output of pip freeze?")
    return list(pins.values())


def serve(folder: Path) -> dict[str, str]:
    """Environment variables that lead git from the repository's address to this checkout's last commit, tagged."""
    shallow = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"], capture_output=True,
                             text=True)
    if shallow.stdout.strip() != "false":                        # git would ask such a server without end
        raise SystemExit("The package is served through git: this needs a full clone (git fetch --unshallow).")
    copy = folder / "served.git"
    subprocess.run(["git", "clone", "--quiet", "--bare", str(ROOT), str(copy)], check=True)
    subprocess.run(["git", "-C", str(copy), "tag", "--force", f"v{VERSION}"], check=True, stdout=subprocess.DEVNULL)
    return {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{copy.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": HOME}


def installed(python: Path) -> dict[str, str]:
    """Name -> version of every distribution of an environment."""
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json", "--disable-pip-version-check"],
                            check=True, capture_output=True, text=True).stdout
    return {entry["name"]: entry["version"] for entry in json.loads(listed)}


def restore(python: Path, before: dict[str, str]) -> None:
    """Take away what a notebook installed; an error if it replaced what was there."""
    now = installed(python)
    moved = {name: (version, now.get(name)) for name, version in before.items() if now.get(name) != version}
    if moved:
        raise SystemExit(f"The notebook changed packages that were there: {moved}")
    if new := sorted(now.keys() - before.keys()):
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *new], check=True)


def kernel(folder: Path, python: Path, variables: dict[str, str]) -> None:
    """A kernel called `colab` that runs `python` with `variables`; papermill finds it through JUPYTER_PATH."""
    spec = folder / "kernels" / "colab"
    spec.mkdir(parents=True, exist_ok=True)
    arguments = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps(
        {"argv": arguments, "display_name": "Colab", "language": "python", "env": variables}), encoding="utf-8")
    os.environ["JUPYTER_PATH"] = str(folder)


def run(path: Path, folder: Path) -> dict:
    """One notebook alone in an empty folder: seconds to the end and to its first map, and the error, if any."""
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / path.name).write_bytes(path.read_bytes())
    done, start, error = folder / f"done-{path.name}", time.time(), ""
    try:
        papermill.execute_notebook(str(place / path.name), str(done), kernel_name="colab", cwd=str(place),
                                   progress_bar=False, start_timeout=300)
    except papermill.PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    left = sorted(file.name for file in place.iterdir() if file.name != path.name)
    first = next((cell for cell in nbformat.read(done, as_version=4).cells if "map_grid(" in cell.source
                  and cell.get("outputs")), None)
    end = datetime.fromisoformat(first.metadata.papermill.end_time).timestamp() if first else float("nan")
    return {"notebook": path.relative_to(NOTEBOOKS).as_posix(), "seconds": round(time.time() - start, 1), "first_map": round(end - start, 1),
            "error": error, "left_behind": left}


def choose(names: list[str]) -> list[Path]:
    """Our notebooks whose names below notebooks/ begin with one of `names`."""
    chosen = [path for path in notebooks() if path.relative_to(NOTEBOOKS).as_posix().startswith(tuple(names))]
    if not chosen:
        raise SystemExit(f"No notebook is called {' or '.join(names)}.")
    return chosen


def main() -> int:
    """Read the command line, make the environment, run; the exit code is the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 00 or exercises/; default: all")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to make the environment with")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "colab")
    parser.add_argument("--freeze", type=Path, help="a list of versions, as pip freeze writes it")
    parser.add_argument("--home", choices=("new", "unwritable"), default="new")
    parser.add_argument("--no-network", action="store_true", help="every address leads nowhere")
    options = parser.parse_args()
    paths = choose(options.names or [""])
    if options.freeze and options.environment.exists():
        parser.error(f"{options.environment} is there already: --freeze is for a new one")
    python = make_environment(options.environment, options.python,
                              from_freeze(options.freeze) if options.freeze else COLAB)
    before, rows = installed(python), []
    if "dealkit" in before:                                      # a run that was stopped has left it behind
        raise SystemExit(f"{options.environment} has dealkit in it already: delete that folder, and run again.")
    folder = Path(tempfile.mkdtemp())
    # /proc takes no new file from anybody, root included; the kernel itself wants a place of its own
    variables = {"HOME": "/proc" if options.home == "unwritable" else str(folder),
                 "IPYTHONDIR": str(folder / "ipython"), "CUDA_VISIBLE_DEVICES": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                 "PIP_CACHE_DIR": str(options.environment.absolute() / "pip-cache")} | serve(folder)
    if options.no_network:
        nowhere = "http://127.0.0.1:9"
        variables |= {"GIT_CONFIG_COUNT": "0", "PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0"}
        variables |= {name: nowhere for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    else:                                                        # the download, before the clock starts
        wanted = [f"{name}=={before[name]}" for name in ("torch", "torchvision", "numpy")]
        wanted.append(f"dealkit @ git+{HOME}@v{VERSION}")
        subprocess.run([str(python), "-m", "pip", "download", "--quiet", "--dest", str(folder / "fetched"), *wanted],
                       check=True, env=os.environ | variables)
    kernel(folder, python, variables)
    for path in paths:
        row = run(path, folder)
        row["right"] = "No dealkit. Network?" in row["error"] if options.no_network else not row["error"]
        row["right"] &= not row["left_behind"]
        rows.append(row)
        print(json.dumps(row), flush=True)
        restore(python, before)
    shutil.rmtree(folder)
    shown = {name: before[name] for name in ("torch", "numpy", "pandas", "ipywidgets", "ipython")}
    version = subprocess.run([str(python), "--version"], capture_output=True, text=True).stdout.split()[1]
    print(json.dumps({"python": version, **shown, "first_heatmap": rows[0]["first_map"]}))
    return sum(not row["right"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
