"""Where the shipped data lies: word lists, checkpoints, concept banks and tables."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_path(*parts: str, must_exist: bool = True) -> Path:
    """Path of a file or folder that is shipped with dealkit.

    An installed dealkit carries its data inside the package (``dealkit/data``); in a checkout the same
    files lie in ``data/`` beside it. Code asks here, so that it works in both places and from any folder.

    Args:
        *parts: the path below ``data``, one name after the other; none at all gives the data folder itself.
        must_exist: whether a missing file is an error. False is for files that are about to be written.

    Returns:
        The absolute path.

    Raises:
        FileNotFoundError: no data folder was found, or it has no such file.

    Example:
        >>> data_path("birdworld", "vocab.json").name  # doctest: +SKIP
        'vocab.json'
    """
    path = _data_folder().joinpath(*parts)
    if must_exist and not path.exists():
        near = path.parent
        while not near.is_dir():
            near = near.parent
        names = ", ".join(sorted(entry.name for entry in near.iterdir() if not entry.name.startswith((".", "__"))))
        raise FileNotFoundError(
            f"dealkit has no data file {'/'.join(parts)!r}: {near} holds {names or 'nothing'}. "
            "Check the name; if a shipped file was deleted, restore it with 'git checkout -- data' or install again."
        )
    return path


def _data_folder() -> Path:
    """The installed ``dealkit/data`` or, in a checkout, the ``data`` beside the package."""
    installed, checkout = _PACKAGE / "data", _PACKAGE.parent / "data"
    if installed.is_dir():
        return installed
    # pyproject.toml tells our checkout from a stranger's folder that happens to be called "data".
    if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return checkout
    raise FileNotFoundError(
        f"dealkit's data was found neither in {installed} nor in a checkout's {checkout}. "
        "Install dealkit again (its wheel carries the data), or work in a full clone of the repository."
    )
