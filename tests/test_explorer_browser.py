"""The explorer in a real JupyterLab: a headless Chromium clicks, types and uploads, and looks at what is shown.

    pytest -m browser tests/test_explorer_browser.py      # with playwright from PyPI and chromium on the path
    EXPLORER_SCREENSHOTS=shots pytest -m browser ...      # keeps a picture of the page after each step
"""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import nbformat
import PIL.Image
import pytest
from skimage.data import chelsea

ROOT = Path(__file__).resolve().parents[1]
CELL = """import dealkit
from dealkit.widgets import Explorer
setup = dealkit.preset("birdworld", device="cpu")
other = dealkit.load_model("birdworld-vit", pretrained="seed1", device="cpu")
Explorer({"seed0": setup.vlm, "seed1": other}, setup.test, bank=setup.bank)"""
# what each picture shows: a hash of its bytes, or that it is hidden
PICTURES = """async () => Promise.all([...document.querySelectorAll('.jp-OutputArea img')].map(async image => {
    if (image.offsetParent === null) return 'hidden';
    const bytes = await (await fetch(image.src)).arrayBuffer();
    return [...new Uint8Array(await crypto.subtle.digest('SHA-1', bytes))].join('.');
}))"""
SECONDS = 60        # how long one step may take on a busy machine
pytestmark = pytest.mark.browser


@pytest.fixture
def folder(tmp_path):
    """A notebook with one cell, and the files to upload."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(CELL)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "explore.ipynb")
    cat = PIL.Image.fromarray(chelsea())
    cat.save(tmp_path / "cat.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cat.jpg").read_bytes()[:9000])
    cat.convert("CMYK").save(tmp_path / "cmyk.jpg")
    cat.rotate(180).save(tmp_path / "animated.gif", save_all=True, append_images=[cat])
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


@pytest.fixture
def address(folder):
    """A JupyterLab of this checkout in the folder, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        lab = subprocess.Popen(command, env=os.environ | own | {"PYTHONPATH": paths}, stdout=log, stderr=log)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", lab, folder / "lab.log")
    finally:
        lab.terminate()
        lab.wait(timeout=30)


def wait_for(address: str, lab: subprocess.Popen, log: Path) -> str:
    for _ in range(2 * SECONDS):
        try:
            urlopen(f"{address}/api", timeout=5).close()
            return address
        except OSError:
            assert lab.poll() is None, log.read_text()
            time.sleep(.5)
    raise AssertionError(f"JupyterLab did not answer: {log.read_text()}")


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not there: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    page.goto(f"{address}/lab/tree/explore.ipynb?reset", timeout=120_000)
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(timeout=120_000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]", timeout=120_000)
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".jp-OutputArea textarea", timeout=240_000)
    return page


class Reader:
    """One who works the controls, and waits each time until the page shows something else."""

    def __init__(self, page, folder: Path):
        self.page, self.out, self.folder, self.steps = page, page.locator(".jp-OutputArea"), folder, 0
        self.shots = Path(os.environ.get("EXPLORER_SCREENSHOTS", folder / "screenshots"))
        self.shots.mkdir(parents=True, exist_ok=True)
        self.shown = [None, None]        # the maps and the overlaps that were seen last

    def look(self) -> tuple[list[str], str]:
        return self.page.evaluate(PICTURES), " ".join(self.out.locator(".widget-html-content").all_inner_texts())

    def waits(self, step: str, expected: Callable[[list[str], str], bool]) -> None:
        """Until pictures and words are as expected, and still are a second later; then takes a picture of the page."""
        end, last = time.monotonic() + SECONDS, None
        while not (expected(*(now := self.look())) and now == last):
            assert time.monotonic() < end, f"{step}: after {SECONDS} s there is {now}; before, it was {self.shown}"
            last = now
            time.sleep(1)
        self.steps += 1
        self.page.screenshot(path=self.shots / f"{self.steps:02}-{step.replace(' ', '-')}.png")

    def sees_new_maps(self, step: str, said: str = "", unsaid: str = "\0") -> None:
        self.waits(step, lambda pictures, words: len(pictures) == 2 and "hidden" not in pictures and said in words
                   and unsaid not in words and all(map(str.__ne__, pictures, map(str, self.shown))))
        self.shown = self.look()[0]

    def is_told(self, step: str, message: str) -> None:
        self.waits(step, lambda pictures, words: pictures == ["hidden"] * 2 and message in words)

    def types(self, text: str) -> None:
        field = self.out.locator("textarea").first
        field.fill(text)
        field.blur()

    def chooses(self, which: int, *options: str) -> None:
        self.out.locator("select").nth(which).select_option(list(options))

    def uploads(self, name: str) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.out.locator(".widget-upload").first.click()
        chooser.value.set_files(self.folder / name)

    def presses(self, button: str) -> None:
        self.page.get_by_role("button", name=button).click()


@pytest.fixture
def reader(page, folder):
    return Reader(page, folder)


def test_a_reader_explores(reader):
    reader.sees_new_maps("load", said="peak in part")
    bird = reader.shown
    reader.types("red head\nblue wing\na bird")
    reader.sees_new_maps("concepts", said="no part named")
    reader.chooses(0, "legrad")
    reader.sees_new_maps("method")
    reader.chooses(1, "seed1")
    reader.sees_new_maps("one model", said="seed1", unsaid="seed0")
    reader.chooses(1, "seed0", "seed1")
    reader.sees_new_maps("both models", said="seed0")
    reader.uploads("cat.jpg")
    reader.sees_new_maps("a photograph", unsaid="peak in part")
    reader.uploads("cut.jpg")
    reader.is_told("a cut file", "damaged or was cut off")
    reader.uploads("cmyk.jpg")
    reader.sees_new_maps("CMYK", said="CMYK colours were converted")
    reader.uploads("notes.txt")
    reader.is_told("a text", "no picture that can be read")
    reader.uploads("animated.gif")
    reader.sees_new_maps("an animation", said="first of 2 frames")
    reader.chooses(0, "relevance")
    reader.sees_new_maps("first method")
    reader.presses("back to the data set")
    reader.sees_new_maps("back", said="peak in part", unsaid="frames")
    assert reader.shown == bird, "the first bird as it was"
    reader.types("turquoise head")
    reader.is_told("an unknown word", "no word for 'turquoise'")
    reader.types("red head " * 300)
    reader.is_told("a long concept", "longer than")
    reader.types("red head\nblue wing")
    reader.sees_new_maps("two concepts", said="peak in part")
    reader.out.locator("input[type=number]").first.fill("7")
    reader.page.keyboard.press("Enter")
    reader.sees_new_maps("another bird")
    assert reader.page.locator(".jp-OutputArea [data-mime-type*=stderr]").count() == 0
