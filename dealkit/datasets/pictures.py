"""Single pictures, as a person brings them: a file, bytes or an array -> one RGB picture, or a sentence on why not."""
from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import shorten

import numpy as np
import PIL.Image
import PIL.ImageOps

MAX_MEGAPIXELS = 25       # more is a gigabyte of floats on its way through a transform
MIN_SIDE = 32             # pixels; what is smaller shows a model nothing but its own blur
MAX_ASPECT = 20           # a transform enlarges the short side, and the long side of a thin strip with it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")     # JPEG brings MPO along, as some telephones write it; no
                                                            # EPS, which Pillow hands to a program of its own
# What Pillow raises for broken files, besides its own UnidentifiedImageError: each format has its ways.
_DAMAGE = (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, struct.error)
Source = str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | PIL.Image.Image


def open_picture(source: Source) -> tuple[PIL.Image.Image, list[str]]:
    """Open a picture of any common format as RGB, upright.

    Args:
        source: path, bytes of a file, array [H, W, 3] or [H, W] of dtype uint8, or a PIL picture.

    Returns:
        The picture, and notes, one sentence for each thing that was done to it (first frame of an animation, CMYK
        colours, a transparent background put on white).

    Raises:
        FileNotFoundError: no such file.
        TypeError: None, a number, a list: nothing that could be a picture.
        ValueError: not a picture, a folder, damaged or cut off, too large, too small or too thin, more than 8 bits a
            channel; one sentence says which, and what to do.

    Example:
        >>> picture, notes = open_picture("parrot.jpg")
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if not isinstance(source, PIL.Image.Image):
        data = _read(source)
        with _damage_said(f"the {len(data):,} bytes are"):
            source = PIL.Image.open(BytesIO(data), formats=FORMATS)
    _check(source)                                  # before a single pixel is decoded
    with _damage_said("it is"):
        return _decode(source)


def _read(source: str | os.PathLike | bytes | bytearray | memoryview) -> bytes:
    """The bytes of a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a picture is a path, the bytes of a file, a numpy array or a PIL picture, and this is of the "
                        f"type {type(source).__name__}; pass one of those.")
    if source == "":
        raise ValueError("the path of the picture is empty; pass the path of a file.")
    if Path(source).is_dir():
        raise ValueError(f"{str(source)!r} is a folder; pass the path of one picture in it.")
    return Path(source).read_bytes()


@contextmanager
def _damage_said(subject: str) -> Iterator[None]:
    """Turn what Pillow raises into a sentence; its warnings are of sizes and of damage too, and say nothing new."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except PIL.UnidentifiedImageError:
        raise ValueError(f"{subject} no picture that can be read; use JPEG, PNG, WebP, GIF, BMP or TIFF.") from None
    except PIL.Image.DecompressionBombError:
        raise ValueError(f"the picture is far beyond {MAX_MEGAPIXELS} megapixels; scale it down first.") from None
    except _DAMAGE as error:
        reason = shorten(str(error), 120) or type(error).__name__
        raise ValueError(f"the picture is damaged or was cut off ({reason}); save or download it again.") from None


def _check(picture: PIL.Image.Image) -> None:
    """Refuse what is too large, too small, too thin or too deep."""
    width, height = picture.size
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise ValueError(f"the picture has {width * height / 1e6:.0f} megapixels ({width} x {height}), and at most "
                         f"{MAX_MEGAPIXELS} are opened; scale it down first.")
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"the picture has {width} x {height} pixels, and each side needs at least {MIN_SIDE}; take a "
                         "larger one.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"the picture is a strip of {width} x {height} pixels, and the long side may be at most "
                         f"{MAX_ASPECT} times the short one; crop it first.")
    if picture.mode.startswith(("I", "F")):         # I;16, I;16B, ...: Pillow would clip their values at 255
        raise ValueError(f"the picture has {picture.mode} pixels (more than 8 bits); save it with 8 bits a channel.")


def _decode(source: PIL.Image.Image) -> tuple[PIL.Image.Image, list[str]]:
    notes, frames = [], getattr(source, "n_frames", 1)
    if frames > 1:
        several = f"{source.format} of several pictures" if source.format in ("MPO", "TIFF") else "Animated"
        notes.append(f"{several}: the first of {frames} frames is used.")
    picture = PIL.ImageOps.exif_transpose(source)   # decodes; a photograph of a telephone is turned upright
    if picture.mode == "CMYK":
        notes.append("CMYK colours were converted to RGB; they may look slightly different.")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
        notes.append("The transparent background was put on white.")
    return picture.convert("RGB"), notes


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"an array of shape {array.shape} and dtype {array.dtype} is no picture; expected uint8 "
                         "[H, W] or [H, W, 3].")
    return PIL.Image.fromarray(array)
