"""Run the notebooks in order, with a progress bar, and say what each one cost.

    python notebooks/run.py                    all of them, into build/
    python notebooks/run.py 00 03_deal         only these (the beginning of a name is enough)
    python notebooks/run.py solutions/03       one of a folder; "solutions/" runs all that are in it
    python notebooks/run.py -p PRESET cub      with another value for a parameter
    python notebooks/run.py --update           and write the outputs back into notebooks/, ready to commit
"""

from __future__ import annotations

import argparse
import ast
import csv
import os
import re
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil
from colab import notebooks
from nbclient.exceptions import DeadKernelError
from strip import write

NOTEBOOKS = Path(__file__).resolve().parent
BUILD = NOTEBOOKS.parent / "build"
RUNTIME = re.compile(r"Runtime about \S+ s on \S+ cores?, peak memory \S+ MB")
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"[\d?]\S* \[\d+:\d+")  # tqdm's "3/10 [00:01<00:04" or "3it [00:01"


class PeakMemory(threading.Thread):
    """Watches the processes that this one starts (the kernel and what it starts) and keeps their largest total size."""

    def __init__(self, interval: float = 0.1):
        super().__init__(daemon=True)
        self.interval, self.peak, self._done = interval, 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(self.interval):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it ended while we were looking
                    continue
            self.peak = max(self.peak, total)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self.join()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def select(names: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of `names`, in order; the numbered ones when there are no names."""
    known = [path.relative_to(NOTEBOOKS).as_posix().removesuffix(".ipynb") for path in notebooks()]
    every = [name for name in known if "/" not in name]
    if not every:
        sys.exit(f"There are no notebooks in {NOTEBOOKS}.")
    wanted = [name.removeprefix("notebooks/").removesuffix(".ipynb") for name in names]
    unknown = [name for name in wanted if not any(one.startswith(name) for one in known)]
    if unknown:
        sys.exit(f"No notebook is called {', '.join(unknown)}. There are: {', '.join(every)}, and in folders "
                 f"{', '.join(name for name in known if '/' in name)}.")
    return [NOTEBOOKS / f"{name}.ipynb" for name in (known if wanted else every)
            if not wanted or name.startswith(tuple(wanted))]


def read_parameters(pairs: list[list[str]], paths: list[Path]) -> dict:
    """Parameters from the command line as Python values; an unknown name is an error, since papermill only warns."""
    parameters = {}
    for name, text in pairs:
        try:
            parameters[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):  # a bare word such as cub
            parameters[name] = text
    for path in paths if parameters else []:
        known = papermill.inspect_notebook(str(path))
        if missing := sorted(set(parameters) - set(known)):
            sys.exit(f"{path.stem} has no parameter {', '.join(missing)}. It has: {', '.join(known) or 'none'}.")
    return parameters


def run(path: Path, parameters: dict, cwd: Path | None) -> dict:
    """Execute one notebook into build/, in `cwd` or in its own folder, and return a row of the table."""
    name, built = path.relative_to(NOTEBOOKS).with_suffix("").as_posix(), BUILD / path.relative_to(NOTEBOOKS)
    built.parent.mkdir(parents=True, exist_ok=True)
    row = {"notebook": name, "status": "ok", "cores": cores()}
    start = time.perf_counter()
    with PeakMemory() as memory:
        try:
            papermill.execute_notebook(
                str(path), str(built), parameters, kernel_name="python3", cwd=str(cwd or path.parent),
                progress_bar={"desc": name}, start_timeout=300,
                extra_arguments=["--log-level=ERROR"],
            )
        except papermill.PapermillExecutionError as error:
            row["status"] = "FAILED"
            print(f"\n{name}, cell {error.exec_count}:\n{error.source}\n{error}", file=sys.stderr, flush=True)
        except DeadKernelError as error:
            row["status"] = "FAILED"
            print(f"\n{name}: {error}. Was there enough memory?", file=sys.stderr, flush=True)
    return row | {"seconds": round(time.perf_counter() - start, 1), "peak_memory_mb": round(memory.peak / 1e6)}


def clean_outputs(outputs: list) -> list:
    """Outputs without what changes from run to run: live widgets and progress bars; split streams are joined."""
    kept = []
    for output in outputs:
        if WIDGET in output.get("data", {}):
            continue
        if output.output_type == "stream":
            if output.name == "stderr":
                lines = [line for line in re.split(r"[\r\n]+", output.text) if line and not PROGRESS.search(line)]
                output.text = "".join(line + "\n" for line in lines)  # warnings stay, for all to see
            if not output.text:
                continue
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        kept.append(output)
    return kept


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook as we commit it: the same bytes wherever the same numbers came out."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
    })
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        for name in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = clean_outputs(cell.outputs)
    return notebook


def update(path: Path, row: dict) -> None:
    """Write the executed notebook back; a numbered one with the measured figures in its cell tagged `runtime`."""
    notebook = clean(nbformat.read(BUILD / path.relative_to(NOTEBOOKS), as_version=4))
    if path.parent == NOTEBOOKS:
        state_runtime(notebook, path, row)
    write(notebook, path)


def state_runtime(notebook: nbformat.NotebookNode, path: Path, row: dict) -> None:
    """Put what the run has cost into the line at the top."""
    seconds = max(1, int(float(f"{row['seconds']:.2g}")))  # two digits: enough to plan with, and it seldom changes
    figures = (f"Runtime about {seconds} s on {row['cores']} core{'s' * (row['cores'] > 1)}, "
               f"peak memory {round(row['peak_memory_mb'], -1)} MB")
    headers = [cell for cell in notebook.cells if "runtime" in cell.metadata.get("tags", [])]
    if len(headers) != 1 or not RUNTIME.search(headers[0].source):
        sys.exit(f"{path.stem} needs one markdown cell tagged 'runtime' with the line "
                 "'Runtime about ? s on ? cores, peak memory ? MB, download: none.'")
    headers[0].source = RUNTIME.sub(figures, headers[0].source)
    guide = NOTEBOOKS / "README.md"  # its table of the notebooks has the seconds, too
    lines = [re.sub(r"\| \d+ s \|", f"| {seconds} s |", line) if f"]({path.name})" in line else line
             for line in guide.read_text(encoding="utf-8").split("\n")]
    guide.write_text("\n".join(lines), encoding="utf-8", newline="\n")


def report(rows: list[dict]) -> None:
    """Print the table and write it to build/timings.csv."""
    with open(BUILD / "timings.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["notebook", "status", "seconds", "peak_memory_mb", "cores"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    width = max(len(row["notebook"]) for row in rows)
    print(f"\n{'notebook':{width}}  min:sec  peak memory")
    for row in rows:
        print(f"{row['notebook']:{width}}  {clock(row['seconds'])}  {row['peak_memory_mb']:8d} MB  "
              f"{row['status'] if row['status'] != 'ok' else ''}".rstrip())
    print(f"{'total':{width}}  {clock(sum(row['seconds'] for row in rows))}")


def clock(seconds: float) -> str:
    """Seconds as mm:ss, seven characters wide."""
    return f"{int(seconds + 0.5) // 60:4d}:{int(seconds + 0.5) % 60:02d}"


def main() -> int:
    """Read the command line, run, report; the exit code is the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks to run; default: all")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--update", action="store_true", help="write the cleaned outputs back into notebooks/")
    parser.add_argument("--cwd", type=Path, help="folder to run in; default: that of the notebook")
    options = parser.parse_args()
    if options.update and options.parameter:
        parser.error("--update commits the outputs of the default parameters: leave out -p")
    # Use the kernel of the Python that runs this script, not one that the user registered under the same name.
    shared = os.path.join(sys.prefix, "share", "jupyter")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [shared, os.environ.get("JUPYTER_PATH")]))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # a debugger's warning about frozen modules, of no use here

    paths = select(options.names)
    parameters = read_parameters(options.parameter, paths)
    BUILD.mkdir(exist_ok=True)
    rows = []
    for path in paths:
        rows.append(run(path, parameters, options.cwd))
        if options.update and rows[-1]["status"] == "ok":
            update(path, rows[-1])
    report(rows)
    failed = sum(row["status"] != "ok" for row in rows)
    print(f"\nThe executed notebooks are in {BUILD}\nTo open them in JupyterLab:  make lab  "
          "(without make: python -m jupyterlab)")
    return failed


if __name__ == "__main__":
    sys.exit(main())
