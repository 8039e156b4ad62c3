"""FLAVA, from Hugging Face's transformers, as a `VLM`: an example of how a model from outside open_clip is brought in.

What dealkit asks of a model is little: `visual`, `encode_image`, `encode_text`, `logit_scale`, `context_length` and a
tokenizer. `FlavaPair` has them. FLAVA's third encoder, which mixes images and texts, plays no part in the cosine of an
image and a text, and is left out.

Source: Singh et al., "FLAVA: a foundational language and vision alignment model", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from dealkit.models.clip import VLM
from dealkit.models.flava_tower import FlavaTower

if TYPE_CHECKING:
    from transformers import FlavaModel

CONTEXT = 77  # tokens, as in FLAVA's own zero-shot evaluation


class FlavaPair(nn.Module):
    """FLAVA's image and text encoders under the names of an open_clip model; the weights are the given model's own."""

    def __init__(self, flava: FlavaModel) -> None:
        super().__init__()
        self.visual = FlavaTower(flava.image_model, flava.image_projection)
        # FLAVA squeezes pictures into a square where CLIP crops them, and has CLIP's colours
        self.visual.preprocess_cfg = {"size": self.visual.image_size, "mean": OPENAI_DATASET_MEAN,
                                      "std": OPENAI_DATASET_STD, "interpolation": "bicubic", "resize_mode": "squash"}
        self.text_model, self.text_projection = flava.text_model, flava.text_projection
        self.logit_scale = flava.logit_scale
        self.context_length = min(CONTEXT, flava.config.text_config.max_position_embeddings)
        self.pad_id = flava.config.text_config.pad_token_id

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """`[B, 3, H, W]` -> `[B, D]`."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Tokens `[K, L]` -> `[K, D]`; padding is masked, so the columns that hold nothing else are cut off."""
        mask = text != self.pad_id
        text = text[:, :int(mask.sum(dim=1).max())]
        hidden = self.text_model(input_ids=text, attention_mask=mask[:, :text.shape[1]].long()).last_hidden_state
        features = self.text_projection(hidden[:, 0])
        return F.normalize(features, dim=-1) if normalize else features


class FlavaTokenizer:
    """A tokenizer of transformers with the call of open_clip's."""

    def __init__(self, tokenizer: Callable) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: Sequence[str], context_length: int = CONTEXT) -> Tensor:
        """Texts -> tokens `[K, context_length]`; what does not fit is cut off and the end kept."""
        return self.tokenizer(list(texts), max_length=context_length, padding="max_length", truncation=True,
                              return_tensors="pt")["input_ids"]


def wrap_flava(flava: FlavaModel, tokenizer: Callable[..., Tensor], name: str = "flava") -> VLM:
    """A transformers FlavaModel as a `VLM`: the same maps, losses and metrics as for an open_clip model.

    The weights are shared with `flava`, not copied: training the one trains the other.

    Args:
        flava: the model, with trained or random weights; put into eval mode.
        tokenizer: texts -> tokens `[K, context_length]`, as `FlavaTokenizer` of the model's own tokenizer.
        name: what the VLM is called.

    Raises:
        TypeError: not a FlavaModel.

    Example:
        >>> vlm = wrap_flava(FlavaModel(FlavaConfig()), FlavaTokenizer(BertTokenizer.from_pretrained(...)))
        >>> vlm.grid
        (14, 14)
    """
    if not isinstance(flava, _transformers().FlavaModel):
        raise TypeError(f"wrap_flava takes a transformers FlavaModel, not a {type(flava).__name__}. Of a "
                        "FlavaForPreTraining, pass its .flava.")
    return VLM(name, FlavaPair(flava.eval()).eval(), tokenizer=tokenizer)


def load_flava(pretrained: str = "facebook/flava-full", device: str | torch.device | None = None) -> VLM:
    """Load FLAVA with trained weights and its tokenizer from the Hugging Face hub, or from a folder.

    Args:
        pretrained: name on the hub, or a folder written by `save_pretrained`. Only safetensors are read.
        device: None is the GPU where there is one, else the CPU.

    Raises:
        ImportError: transformers is not installed.
        ConnectionError: the weights or the tokenizer are not on this computer and cannot be fetched.
    """
    transformers = _transformers()
    try:
        flava = transformers.FlavaModel.from_pretrained(pretrained, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    except OSError as error:  # what transformers raises for no network, no such name, and no safetensors
        raise ConnectionError(f"FLAVA {pretrained!r} is not on this computer and could not be fetched as safetensors: "
                              f"{str(error)[:300]} Connect once (it is kept), or pass the folder of a copy.") from error
    return wrap_flava(flava, FlavaTokenizer(tokenizer)).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError("FLAVA comes from Hugging Face's transformers, which is not installed. Install it with "
                          "`pip install \"dealkit[hub]\"`, or use a model of open_clip: load_model(name).") from error
    return transformers
