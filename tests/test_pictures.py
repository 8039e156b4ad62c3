"""Pictures as people bring them: opened as RGB, with a note, or refused in one sentence."""
from __future__ import annotations

import random
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from dealkit.datasets.pictures import open_picture

PHOTO = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def file(picture: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    if "append_images" in options:      # copies: a picture keeps the settings of the encoder that it was saved with
        options["append_images"] = [more.copy() for more in options["append_images"]]
    picture.copy().save(buffer, kind, **options)
    return buffer.getvalue()


def test_path_bytes_array_and_picture_are_the_same_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(file(PHOTO))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), file(PHOTO), memoryview(file(PHOTO)), np.asarray(PHOTO),
                   PHOTO):
        picture, notes = open_picture(source)
        assert picture.mode == "RGB" and notes == [] and (np.asarray(picture) == np.asarray(PHOTO)).all()


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="parrot.jpg"):
        open_picture(tmp_path / "parrot.jpg")


def test_greyscale_and_palettes_become_rgb():
    for mode in ("L", "P", "1", "LA"):
        picture, _ = open_picture(file(PHOTO.convert(mode)))
        assert picture.mode == "RGB" and picture.size == PHOTO.size


def test_cmyk_is_converted_with_a_note():
    picture, notes = open_picture(file(PHOTO.convert("CMYK"), "JPEG"))
    assert picture.mode == "RGB" and len(notes) == 1 and "CMYK" in notes[0]


def test_the_first_frame_of_an_animation():
    second = PIL.Image.new("RGB", PHOTO.size, "red")
    picture, (note,) = open_picture(file(second, "GIF", save_all=True, append_images=[PHOTO]))
    assert "first of 2 frames" in note and picture.getpixel((5, 5)) == (255, 0, 0)


def test_transparency_is_put_on_white():
    clear = PHOTO.convert("RGBA")
    clear.putalpha(0)
    picture, (note,) = open_picture(file(clear))
    assert "white" in note and np.asarray(picture).min() == 255


def test_a_telephones_photograph_is_turned_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6       # orientation: to be turned by 90 degrees
    picture, _ = open_picture(file(PHOTO, "JPEG", exif=exif))
    assert picture.size == PHOTO.size[::-1]


@pytest.mark.parametrize("source, message", [
    (b"", "0 bytes are no picture"),
    (b"<html>not found</html>", "22 bytes are no picture.*JPEG, PNG"),
    (file(PHOTO, "JPEG")[:700], "damaged or was cut off.*again"),
    (file(PHOTO)[:900], "damaged or was cut off"),
    (file(PHOTO.resize((31, 64))), "31 x 64 pixels.*at least 32"),
    (file(PIL.Image.new("1", (6000, 5000))), r"30 megapixels \(6000 x 5000\).*at most 25.*scale it down"),
    (file(PIL.Image.new("1", (20000, 20000))), "megapixels.*scale it down"),
    (file(PIL.Image.fromarray(np.zeros((64, 64), np.uint16))), "more than 8 bits"),
    (file(PIL.Image.frombytes("I;16B", (64, 64), bytes(8192)), "TIFF"), "I;16B pixels.*more than 8 bits"),
    (file(PIL.Image.new("F", (64, 64)), "TIFF"), "F pixels.*more than 8 bits"),
    (PIL.Image.new("I", (64, 64)), "I pixels.*more than 8 bits"),
    (file(PIL.Image.new("1", (200_000, 32))), "strip of 200000 x 32.*at most 20 times.*crop it"),
    (file(PIL.Image.new("1", (40, 801))), "strip of 40 x 801"),
    (file(PHOTO, "EPS"), "no picture that can be read"),
    ("", "the path of the picture is empty"),
    (Path(__file__).parent, "tests' is a folder.*one picture in it"),
    (np.zeros((64, 64, 3)), r"shape \(64, 64, 3\) and dtype float64.*uint8"),
    (np.zeros((64, 64, 2), np.uint8), r"shape \(64, 64, 2\)"),
])
def test_what_cannot_be_shown_is_refused_in_a_sentence(source, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_picture(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, [PHOTO], {"name": "photo.png"}])
def test_what_could_not_be_a_picture_is_a_type_error(source):
    with pytest.raises(TypeError, match=f"numpy array or a PIL picture.*type {type(source).__name__};"):
        open_picture(source)


def test_the_longest_strip_that_is_opened():
    assert open_picture(file(PIL.Image.new("1", (800, 40))))[0].size == (800, 40)


def test_lab_colours_are_not_transparency():
    picture, notes = open_picture(file(PIL.Image.new("LAB", (64, 48), (255, 128, 128)), "TIFF"))
    assert picture.mode == "RGB" and notes == [] and np.asarray(picture).min() > 250


def test_a_telephones_file_of_two_pictures_gives_the_first():
    picture, (note,) = open_picture(file(PIL.Image.new("RGB", (64, 48), "red"), "MPO", save_all=True,
                                         append_images=[PHOTO]))
    assert "first of 2" in note and "Animated" not in note and picture.getpixel((5, 5))[0] > 250


def rich_files() -> dict[str, bytes]:
    """Files of every format that is opened, with what they may hold besides pixels."""
    exif, text = PIL.Image.Exif(), PngInfo()
    exif[0x0112], exif[0x010F] = 6, "a telephone"
    text.add_text("title", "a long text " * 30, zip=True)
    block = PHOTO.resize((8, 6)).resize((64, 48), PIL.Image.Resampling.NEAREST)
    several, page = {"save_all": True, "append_images": [PHOTO]}, {"compression": "tiff_adobe_deflate"}
    return {"JPEG": file(block, "JPEG", exif=exif), "CMYK": file(block.convert("CMYK"), "JPEG"),
            "progressive": file(block, "JPEG", progressive=True), "MPO": file(block, "MPO", **several),
            "PNG": file(block, exif=exif, pnginfo=text), "palette": file(block.convert("P"), transparency=3),
            "animated PNG": file(block, **several), "WebP": file(block, "WEBP", exif=exif),
            "animated WebP": file(block, "WEBP", **several), "GIF": file(block, "GIF"),
            "animated GIF": file(block, "GIF", **several), "TIFF": file(block, "TIFF", exif=exif),
            "packed TIFF": file(block, "TIFF", **page), "pages": file(block, "TIFF", **several),
            "BMP": file(block, "BMP"), "palette BMP": file(block.convert("P"), "BMP")}


def damaged(data: bytes, seed: int, count: int = 60):
    """The file cut off at `count` places, most of them in its head, and with bytes of it changed `count` times."""
    rng = random.Random(seed)
    for n in range(count):
        yield data[:n if n < count // 2 else rng.randrange(len(data))]
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(min(len(data), rng.choice((200, len(data)))))       # half of them in the head
            changed[place] = rng.choice((0, 255, rng.randrange(256)))
        yield bytes(changed)


@pytest.mark.parametrize("kind", rich_files())
def test_a_damaged_file_gives_a_picture_or_one_sentence(kind):
    """Of a file cut within its pixels a decoder may well make a picture; nothing else but our own refusal comes out."""
    opened = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in damaged(rich_files()[kind], seed=0):
            try:
                picture, _ = open_picture(data)
                opened += picture.mode == "RGB" and picture.load() is not None
            except ValueError as error:
                said = str(error)
                assert said.startswith("the ") and said.endswith(".") and "\n" not in said
                refused += 1
    assert opened + refused == 120 and refused > 20


def test_a_text_that_unpacks_without_end_is_refused():
    text = PngInfo()
    text.add_text("bomb", "x" * 3_000_000, zip=True)
    with pytest.raises(ValueError, match="damaged or was cut off .*too large"):
        open_picture(file(PHOTO, pnginfo=text))
