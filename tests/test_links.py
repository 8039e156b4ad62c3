"""Links lead somewhere: those inside the repository always, addresses of the web when asked for with -m network.

Needs nothing but pytest (run with --noconftest where PyTorch is not installed), because one weekly job has only that.
"""

from __future__ import annotations

import ast
import json
import os
import re
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMEPAGE = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]
OWN = HOMEPAGE.removeprefix("https://github.com/")                     # owner/name
PUBLISHED = os.environ.get("GITHUB_REPOSITORY") == OWN                 # GitHub sets it for what runs there


def found(*patterns: str) -> list[Path]:
    """Files of the repository, without the copies that Jupyter makes."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern) if ".ipynb_checkpoints" not in path.parts)


PAGES = found("README.md", "CONTRIBUTING.md", "notebooks/*.md", "notebooks/**/*.ipynb", "data/*.md")
MORE = found("CITATION.cff", ".github/**/*.yml", "dealkit/**/*.py")    # no Markdown, but addresses

# --- the scanner ------------------------------------------------------------------------------------------------------

FENCED = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(?:.*?^ {0,3}\1[`~]*[ \t]*$|.*\Z)", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|(?<![\\$])\$(?=\S)(?:[^$\n]|\n(?!\n))*?(?<=[^\s\\])\$(?!\d)", re.DOTALL)
TARGET = r"(<[^<>\n]*>|[^\s()<>]+(?:\([^\s()]*\)[^\s()<>]*)*)"
INLINE = re.compile(r"\]\(\s*" + TARGET + r"""(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)""")
DEFINITION = re.compile(r"^ {0,3}\[(?!\^)[^\]\n]+\]:[ \t]*(<[^<>\n]*>|\S+)", re.MULTILINE)
HTML = re.compile(r"""<(?:a|img|source|video)\b[^>]*?\b(?:href|src)\s*=\s*["']([^"']+)["']""", re.IGNORECASE)
AUTOLINK = re.compile(r"<([a-z][a-z0-9+.-]+:[^\s<>]*)>", re.IGNORECASE)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
# `git+https:` is for pip, which wants git's address; the notebooks' first cell is run as a whole elsewhere.
ADDRESS = re.compile(r"(?<!git\+)\bhttps?://[^\s<>\"'`\\|{}\u0080-\uffff]+(?P<open>\{)?")
MADE = [("build",), (".venv",)]                                         # there for whoever ran make, and not on GitHub
NOT_ASKED = {"localhost", "127.0.0.1", "example.org", "example.com"}


def targets(markdown: str) -> list[str]:
    """What the links and pictures of a text lead to, without what stands in code, formulas and comments."""
    text = COMMENT.sub(" ", FENCED.sub("\n", markdown))
    text = FORMULA.sub(" ", CODE_SPAN.sub("code", text))
    matches = [match for pattern in (INLINE, DEFINITION, HTML, AUTOLINK) for match in pattern.finditer(text)]
    return [match.group(1).strip("<>") for match in sorted(matches, key=lambda match: match.start(1))]


def headings(markdown: str) -> list[str]:
    """The text of every heading, as it is shown."""
    shown = []
    for heading in HEADING.findall(COMMENT.sub("", FENCED.sub("\n", markdown))):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        shown.append(re.sub(r"\*+|`|(?<!\w)_|_(?!\w)|<[^>]+>", "", heading).strip())
    return shown


def github_anchors(markdown: str) -> set[str]:
    """The fragments of a page on GitHub; a heading that comes again gets a number."""
    seen, anchors = Counter(), set()
    for heading in headings(markdown):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def jupyter_anchors(markdown: str) -> set[str]:
    """The fragments of a notebook in JupyterLab: only spaces change."""
    return {heading.replace(" ", "-") for heading in headings(markdown)}


def cells(path: Path, kind: str) -> list[str]:
    """The sources of a notebook's cells of one kind, read as JSON because nbformat may be missing."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@cache
def markdown_of(path: Path) -> str:
    """What is Markdown in a page or a notebook."""
    return "\n\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")


def fault(page: Path, target: str, root: Path = ROOT) -> str | None:
    """What is wrong with a link inside the repository; None where nothing is, or where it leads out to the web."""
    if re.match(r"(https?|mailto|attachment):", target, re.IGNORECASE):
        return None
    if re.match(r"[/\\]|[a-z]+:", target, re.IGNORECASE):
        return "is absolute: write it relative to the page"
    path, _, fragment = unquote(target).partition("#")
    goal = (page.parent / path.partition("?")[0]).resolve() if path else page
    if not goal.is_relative_to(top := root.resolve()) or not goal.exists() or goal.relative_to(top).parts[:1] in MADE:
        return "leads to no file of the repository"
    anchors = {".md": github_anchors, ".ipynb": jupyter_anchors}.get(goal.suffix)
    if fragment and anchors and fragment not in anchors(markdown_of(goal)):
        return f"leads to no heading of {goal.name}"
    return None


def own_files(address: str) -> list[str]:
    """The files that an address of our own repository names: on GitHub, Colab or Binder."""
    return [unquote(name) for name in re.findall(rf"{re.escape(OWN)}/(?:blob|tree|raw)/[^/]+/([^?#]+)", address)
            + re.findall(r"[?&](?:labpath|filepath|urlpath=(?:lab/tree|lab|tree|notebooks))[=/]([^&#]+)", address)]


def trim(address: str) -> str:
    """An address without what belongs to the sentence: its full stop, or the bracket around it."""
    while address and (address[-1] in ".,;:!?*_" or address[-1] in ")]" and
                       address.count(address[-1]) > address.count("(["[")]".index(address[-1])])):
        address = address[:-1]
    return address


def bare(text: str) -> list[str]:
    """The addresses in a text without markup; one with a placeholder, such as {name}, is none."""
    return [trim(match.group()) for match in ADDRESS.finditer(text) if not match["open"]]


def strings(python: str) -> list[str]:
    """Docstrings and other strings of a module (the data sets' addresses are such); parts of f-strings are left out."""
    tree = ast.parse(python)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    return [node.value for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts]


def addresses(path: Path) -> list[str]:
    """Every web address that a file names, in order, without fragments; code blocks (bibtex, examples) excepted."""
    if path.suffix == ".py":
        listed = [address for text in strings(path.read_text(encoding="utf-8")) for address in bare(text)]
    elif path.suffix in (".md", ".ipynb"):
        text = COMMENT.sub(" ", FENCED.sub("\n", markdown_of(path)))
        linked = [target for target in targets(text) if target.lower().startswith("http")]
        rest = HTML.sub(" ", AUTOLINK.sub(" ", INLINE.sub(" ", text)))
        code = cells(path, "code") if path.suffix == ".ipynb" else []
        listed = linked + [address for part in [rest, *code] for address in bare(part)]
    else:
        listed = bare(path.read_text(encoding="utf-8"))
    kept = [urldefrag(address).url for address in listed if urlsplit(address).hostname not in NOT_ASKED]
    return list(dict.fromkeys(kept))


# --- inside the repository --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page):
    wrong = [f"{target!r} {fault(page, target)}" for target in targets(markdown_of(page)) if fault(page, target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES + MORE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_addresses_of_this_repository_name_its_files(page):
    """So that a badge does not lead to a notebook that was renamed; that the page is there, only publishing shows."""
    own = [address for address in addresses(page) if OWN in address]
    assert [name for address in own for name in own_files(address) if not (ROOT / name).exists()] == []


def test_the_scanner_sees_the_readme():
    readme = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "data/birdworld/before_after.png" in readme and "notebooks/00_tour.ipynb" in readme and len(readme) > 10
    colab = f"https://colab.research.google.com/github/{OWN}/blob/main/notebooks/00_tour.ipynb"
    assert colab in addresses(ROOT / "notebooks" / "00_tour.ipynb")


# --- on the web -------------------------------------------------------------------------------------------------------

BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0 "
                         "Safari/537.36", "Accept": "*/*", "Accept-Language": "en"}
ALIVE = {403, 429}  # somebody is there, and does not like scripts


def ask(address: str, method: str, opener: urllib.request.OpenerDirector) -> int | str:
    """The status of an answer after all redirections, or the words of a failure; a body is not read."""
    try:
        with opener.open(urllib.request.Request(address, method=method, headers=BROWSER), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, ValueError) as error:  # no such host, no connection, out of time, not an address
        return str(error)


def dead(address: str, opener=None, tries: int = 3, pause: float = 5.0) -> str | None:
    """What an address answers, if it is not alive. HEAD first; some servers know GET alone."""
    opener = opener or urllib.request.build_opener()
    for left in reversed(range(tries)):
        for method in ("HEAD", "GET"):
            said = ask(address, method, opener)
            if said in ALIVE or isinstance(said, int) and said < 400:
                return None
        if said in (404, 410) or not left:
            return str(said)
        time.sleep(pause)


def dead_ones(pages: dict[str, list[str]]) -> list[str]:
    """address -> its files in; one line for each that is dead out."""
    with ThreadPoolExecutor(8) as pool:
        said = dict(zip(pages, pool.map(dead, pages)))
    return [f"{address}: {said[address]}, in {', '.join(pages[address])}" for address in pages if said[address]]


def by_address(own: bool) -> dict[str, list[str]]:
    """Address -> the files that name it, of our repository or of all others."""
    pages = {}
    for path in PAGES + MORE:
        for address in addresses(path):
            if (OWN in address) == own:
                pages.setdefault(address, []).append(path.relative_to(ROOT).as_posix())
    return pages


@pytest.mark.network
def test_every_address_answers():
    lines = dead_ones(by_address(own=False))
    assert not lines, f"{len(lines)} dead:\n" + "\n".join(lines)


@pytest.mark.network
def test_every_address_of_this_repository_answers():
    pages = by_address(own=True)
    if not PUBLISHED:
        pytest.skip(f"{len(pages)} addresses with {OWN} in them were not asked: this does not run in that repository, "
                    "so it may not be published")
    lines = dead_ones(pages)
    assert not lines, f"{len(lines)} dead:\n" + "\n".join(lines)


# --- the scanner and the asker, on made-up cases ----------------------------------------------------------------------

PAGE = """\
# A title with `code` & more: what's it?

See [a page](other.md#second-part "with a title"), [the notebook
02](<a notebook.ipynb>), [brackets [in] it](x_(1).md) and ![a picture](pictures/bird.png).
[![badge](https://img.example.net/a.svg)](https://host.example.net/run?a=1#part)

[defined]: defined.md
[^1]: a footnote is [linked](note.md)
<a href="anchor.md">x</a> <img alt="y" src='picture.png'/> <https://auto.example.net/x>

Not links: `[code](code.md)`, ``[more `code`](code2.md)``, $f[x](y)$, <!-- [hidden](hidden.md) -->,
`http://localhost:1/`.

```bibtex
[fenced](fenced.md) url = {https://fenced.example.net}
# no heading
```

~~~
[fenced](tilde.md)
```
[still fenced](tilde2.md)
~~~

## Second part
## Second part
Bare (https://bare.example.net/a_(b)), `https://span.example.net/c.tgz`, git+https://git.example.net/d.
"""


def test_links_are_found_where_a_reader_sees_them():
    assert targets(PAGE) == [
        "other.md#second-part", "a notebook.ipynb", "x_(1).md", "pictures/bird.png", "https://img.example.net/a.svg",
        "https://host.example.net/run?a=1#part", "defined.md", "note.md", "anchor.md", "picture.png",
        "https://auto.example.net/x"]


def test_headings_become_anchors():
    assert github_anchors(PAGE) == {"a-title-with-code--more-whats-it", "second-part", "second-part-1"}
    assert jupyter_anchors("## Exercise 3.1\ntext") == {"Exercise-3.1"}


def test_addresses_are_found_in_prose_code_and_strings(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    assert addresses(page) == [
        "https://img.example.net/a.svg", "https://host.example.net/run?a=1", "https://auto.example.net/x",
        "https://bare.example.net/a_(b)", "https://span.example.net/c.tgz"]
    module = tmp_path / "module.py"
    module.write_text('"""See https://a.example.net/b."""\nx = f"https://c.example.net/{d}"\n'
                      'y = "https://e.example.net/{name}"  # https://comment.example.net\n', encoding="utf-8")
    assert addresses(module) == ["https://a.example.net/b"]
    notebook = tmp_path / "notebook.ipynb"
    notebook.write_text(json.dumps({"cells": [
        {"cell_type": "markdown", "source": ["# A\n", "[b](https://b.example.net)"]},
        {"cell_type": "code", "source": "x = 'https://c.example.net/d'", "outputs": []}]}), encoding="utf-8")
    assert addresses(notebook) == ["https://b.example.net", "https://c.example.net/d"]


def test_our_own_addresses_name_files():
    assert own_files(f"https://github.com/{OWN}/blob/main/data/a%20b.csv?plain=1#L3") == ["data/a b.csv"]
    binder = f"https://mybinder.org/v2/gh/{OWN}/main"
    assert own_files(f"{binder}?labpath=notebooks/00.ipynb") == ["notebooks/00.ipynb"]
    assert own_files(f"{binder}?urlpath=lab/tree/notebooks/00.ipynb") == ["notebooks/00.ipynb"]
    assert own_files("https://github.com/others/theirs/blob/main/a.py") == []


@pytest.mark.parametrize("target, said", [
    ("other.md", None), ("other.md#part-one", None), ("#here", None), ("folder/", None), ("b%20c.ipynb#Part-1.2", None),
    ("https://nowhere.example.net", None), ("mailto:a@b.c", None),
    ("missing.md", "no file"), ("build/made.md", "no file"), ("../outside.md", "no file"),
    ("other.md#part-two", "no heading of other.md"), ("b%20c.ipynb#part-12", "no heading of b c.ipynb"),
    ("/other.md", "absolute"), (r"C:\other.md", "absolute"), ("file:other.md", "absolute"),
])
def test_a_link_inside_is_checked(tmp_path, target, said):
    root = tmp_path / "repository"
    for folder in ("folder", "build"):
        (root / folder).mkdir(parents=True)
    (root / "build" / "made.md").write_text("", encoding="utf-8")
    (tmp_path / "outside.md").write_text("", encoding="utf-8")
    (root / "page.md").write_text("# Here", encoding="utf-8")
    (root / "other.md").write_text("# Part one", encoding="utf-8")
    (root / "b c.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": "# Part 1.2"}]}), encoding="utf-8")
    found_fault = fault(root / "page.md", target, root)
    assert said in found_fault if said else found_fault is None


class Answers(BaseHTTPRequestHandler):
    """Answers as its table says, one status after the other for each method and path; the last one stays."""

    table = {"HEAD /fine": [200], "HEAD /get-only": [405], "GET /get-only": [200], "HEAD /gone": [404],
             "GET /gone": [404], "HEAD /moved": [301], "GET /moved": [301], "HEAD /busy": [429], "HEAD /shut": [403],
             "HEAD /flaky": [503], "GET /flaky": [503, 503, 200], "HEAD /broken": [500], "GET /broken": [500]}
    asked: list[str]

    def answer(self) -> None:
        self.asked.append(request := f"{self.command} {self.path}")
        listed = self.table[request]
        self.send_response(listed[min(self.asked.count(request), len(listed)) - 1])
        if self.path == "/moved":
            self.send_header("Location", "/get-only")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET = answer

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Answers,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path, said, asked", [
    ("fine", None, 1), ("get-only", None, 2), ("gone", "404", 2), ("moved", None, None), ("busy", None, 1),
    ("shut", None, 1), ("flaky", None, 6), ("broken", "500", 6),
])
def test_an_answer_is_judged(server, path, said, asked):
    address, log = server
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert dead(f"{address}/{path}", direct, pause=0) == said
    assert asked is None or len(log) == asked


def test_nobody_there_is_dead():
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as closed:
        port = closed.server_port
    assert "refused" in dead(f"http://127.0.0.1:{port}/", direct, pause=0).lower()
    assert dead("http://", direct, pause=0)
