"""A CLIP with CLIP's own words and context, and towers so small that a notebook runs through it in seconds."""
from __future__ import annotations

import open_clip

NAME = "test-tiny-clip"
CONFIG = {"embed_dim": 16, "quick_gelu": True,
          "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}


def register(monkeypatch) -> str:
    """Make it a model of open_clip's for one test -> its name."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, CONFIG)
    return NAME
