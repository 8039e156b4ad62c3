"""Vision-language models: loading them (`clip.py`), their words (`words.py`), and where they are cut (`towers.py`)."""

from dealkit.models.clip import VLM, load_model
from dealkit.models.flava import load_flava, wrap_flava
from dealkit.models.split import Split
from dealkit.models.towers import Tower, check_images, find_tower
from dealkit.models.words import WordTokenizer

__all__ = ["VLM", "Split", "Tower", "WordTokenizer", "check_images", "find_tower", "load_flava",
           "load_model", "wrap_flava"]
