"""Vision-language models: `load_model` finds one by name, `VLM` is what the rest of dealkit works with."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dealkit.models.hub import from_hub, hub_name
from dealkit.models.towers import Tower, check_images, find_tower
from dealkit.models.weights import BIRDWORLDS, check_unresized, find_weights
from dealkit.models.words import TokenCache, WordTokenizer, check_texts, encode_tokens
from dealkit.paths import data_path

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VLM:
    """An open_clip model with its name, its words, and its image tower cut for explanations.

    Attributes:
        name: open_clip's name of the architecture.
        model: the stock open_clip model; train it, freeze it, move it as usual.
        preprocess: PIL picture -> tensor `[3, H, W]`, normalised for the model.
    """

    def __init__(self, name: str, model: nn.Module, tokenizer: Callable[..., Tensor] | None = None) -> None:
        self.name, self.model = name, model
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
        self.preprocess = image_transform_v2(config, is_train=False)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        self._tokens = TokenCache()
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @cached_property
    def tokenizer(self) -> Callable[..., Tensor]:
        """Texts -> tokens; loaded when first needed, because some come from a hub."""
        if self.name in BIRDWORLDS:
            words = json.loads(data_path("birdworld", "vocab.json").read_text(encoding="utf-8"))
            return WordTokenizer(words, self.model.context_length)
        hub = hub_name(self.name, "tokenizer") or hub_name(self.name, "model")
        if hub is None:
            return open_clip.get_tokenizer(self.name)
        with from_hub(hub, f"the tokenizer of {self.name}, {hub!r} on the Hugging Face hub",
                      "pass embeddings [K, D] in the place of texts: they need no tokenizer."):
            return open_clip.get_tokenizer(self.name)

    @cached_property
    def tower(self) -> Tower:
        """The image tower and where it can be cut; NotImplementedError for a family without a cut."""
        return find_tower(self.model.visual)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the maps."""
        return self.tower.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images, in pixels."""
        size = self.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied with before the softmax: a scalar tensor, the exponential of the parameter."""
        return self.model.logit_scale.exp().reshape(())

    @property
    def device(self) -> torch.device:
        return next(self.model.visual.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.visual.parameters()).dtype

    def to(self, device: str | torch.device) -> VLM:
        """Move the model, in place; returns itself."""
        self.model.to(device)
        return self

    def check_images(self, images: Tensor) -> Tensor:
        """The batch on the model's device and in its dtype; TypeError or ValueError where the model cannot take it."""
        return check_images(images, self.image_size).to(self.device, self.dtype)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` -> embeddings `[B, D]` of unit norm, with gradients where they are enabled."""
        return F.normalize(self.model.encode_image(self.check_images(images), normalize=False), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """K texts -> embeddings `[K, D]` of unit norm, with gradients where they are enabled.

        Raises:
            TypeError, ValueError: not a list of str, no texts, an empty text, one that is longer than the context, or
                (Birdworld) a word that the model does not know.
            ImportError, ConnectionError: a tokenizer from a hub that cannot be had; the message names it.

        Example:
            >>> vlm.encode_text(["red head", "blue wing"]).shape
            torch.Size([2, 96])
        """
        texts = check_texts(texts)
        # a text tower from the hub may take more tokens than it was trained with, or (mT5) not say how many it takes
        length = getattr(self.tokenizer, "context_length", None) or self.model.context_length
        tokens = self._tokens(self.tokenizer, texts, length)
        return F.normalize(encode_tokens(self.model, tokens), dim=-1)

    def unnormalise(self, images: Tensor) -> Tensor:
        """Undo the model's normalisation: `[..., 3, H, W]` -> colours in 0..1, to look at."""
        return (images * self._std.to(images) + self._mean.to(images)).clamp(0, 1)

    def save(self, path: str | Path) -> Path:
        """Write the weights as safetensors that `load_model` and stock `open_clip.create_model` both read.

        The file is written beside its place and renamed, so that an interrupted save leaves the old one whole.

        Raises:
            ValueError: the path does not end in .safetensors.
            OSError: the file cannot be written (no permission, no space).
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"weights are saved as safetensors, so the name must end in .safetensors: {path.name!r}.")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
            save_file(tensors, temporary, metadata={"model": self.name})
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write {path}: {error}. Check that the folder is writable and has space.") from error
        finally:
            with suppress(OSError):  # the folder itself may be what is wrong
                temporary.unlink(missing_ok=True)
        return path

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"VLM({self.name!r}, {count:.1f} M parameters, {self.device}, {self.dtype})"


def load_model(name: str, pretrained: str | Path | None = "default", device: str | torch.device | None = None,
               dtype: str | torch.dtype = "float32") -> VLM:
    """Load a vision-language model by its open_clip name, or the tiny one of Birdworld.

    Args:
        name: "birdworld-vit" ("birdworld-rn", a ResNet; "birdworld-vit-224" for larger images), or any of
            open_clip.list_models().
        pretrained: a tag, or the path of a safetensors file that `VLM.save` wrote. None gives random weights (seed them
            with torch.manual_seed). "default" is "seed0" for birdworld-vit and birdworld-rn; other models need a tag.
        device: None is the GPU where there is one, else the CPU.
        dtype: "float32", "float64", "bfloat16" or "float16". Train in float32: in half precision small updates vanish.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: unknown name, tag or dtype; a device that this computer does not have; a tag that belongs to another
            activation function; a file that is not safetensors or holds another model.
        ConnectionError: weights that are not on this computer yet and cannot be fetched; or a text tower that is
            described on a hub (roberta, xlm-roberta, mt5, nllb), by name.
        ImportError: such a text tower, where transformers is not installed.

    Example:
        >>> vlm = load_model("birdworld-vit")
        >>> vlm.grid
        (10, 10)
    """
    name = name.replace("/", "-")  # OpenAI writes ViT-B/32
    if name in BIRDWORLDS and name not in open_clip.list_models():
        open_clip.add_model_config(data_path("birdworld", f"{name}.json"))
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, [*BIRDWORLDS, *open_clip.list_models()], n=5, cutoff=0.5)
        raise ValueError(f"unknown model {name!r}. Close: {near or 'none'}; open_clip.list_models() has all names.")
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {list(DTYPES)}.")
    device = _find_device(device)
    weights = find_weights(name, pretrained)
    is_file = str(weights).endswith(".safetensors")
    # Birdworld's images are used as rendered, in 0..1.
    as_rendered = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} if name in BIRDWORLDS else None
    text_tower = hub_name(name, "model")
    fetch = nullcontext() if text_tower is None else from_hub(
        text_tower, f"the text tower of {name}, {text_tower!r} on the Hugging Face hub",
        "choose a model whose text tower open_clip builds itself, such as ViT-B-32-quickgelu.")
    try:
        with fetch:  # without pretrained_text=False, None would mean trained weights for a text tower from the hub
            model = open_clip.create_model(name, pretrained=weights, pretrained_text=False,
                                           force_preprocess_cfg=as_rendered)
    except RuntimeError as error:
        if not is_file:
            raise
        raise ValueError(f"{weights} does not hold the weights of {name}: {str(error)[:500]} ... "
                         "Load it under the name that it was saved from.") from error
    if is_file:
        check_unresized(weights, model)
    return VLM(name, model.to(device, dtype).eval())


def _find_device(device: str | torch.device | None) -> torch.device:
    """The device to load a model on; None is the GPU where there is one. ValueError where it cannot hold a tensor."""
    if device is None:       # launched as one process a GPU, each takes its own
        own = os.environ.get("LOCAL_RANK")
        return torch.device(("cuda" if own is None else f"cuda:{own}") if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(f"device {device!r} is not one that this computer has, {here}; choose one of these, or None "
                         "for the GPU where there is one.") from error
