"""Finding weights: which tags and files fit a model, and a plain word about those that do not."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import open_clip
import torch
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from dealkit.models.hub import reach_hub
from dealkit.paths import data_path

BIRDWORLD = "birdworld-vit"  # the tiny CLIP that comes with dealkit
# a ModifiedResNet beside it; and a larger ViT, without weights: pretrain it on a GPU
BIRDWORLDS = (BIRDWORLD, "birdworld-rn", "birdworld-vit-224")
SHIPPED = {BIRDWORLD: "seed", "birdworld-rn": "rn-seed"}  # what the names of the files with their weights begin with


def find_weights(name: str, pretrained: str | Path | None) -> str | None:
    """What to hand to open_clip.create_model as `pretrained`: a tag, the path of a safetensors file, or None.

    Raises:
        ValueError: a tag or file that does not exist, is a pickle, or belongs to another model.
        ConnectionError: a tag whose weights are not on this computer and cannot be fetched.
    """
    if pretrained is None:
        return None
    ours = {}
    if name in SHIPPED:
        paths = sorted(data_path("birdworld").glob(f"{SHIPPED[name]}*.safetensors"))
        ours = {path.stem.removeprefix("rn-"): str(path) for path in paths}
    tags = list(ours) if name in BIRDWORLDS else open_clip.list_pretrained_tags_by_model(name)
    choices = f"Tags of {name}: {', '.join(tags) or 'none'}; a .safetensors file; or None for random weights."
    if pretrained == "default":
        if name not in SHIPPED:
            raise ValueError(f"{name} has no default weights; say which with pretrained=. {choices}")
        pretrained = "seed0"
    if pretrained in ours:
        return ours[pretrained]
    if open_clip.is_pretrained_cfg(name, str(pretrained)):
        _fetch(name, str(pretrained))
        return str(pretrained)
    path = Path(pretrained)
    if not path.is_file():
        plain = name.removesuffix("-quickgelu")
        if plain != name and open_clip.is_pretrained_cfg(plain, str(pretrained)):
            raise ValueError(f"the weights {pretrained!r} were trained with GELU, and {name} computes QuickGELU. "
                             f"Load {plain!r} instead.")
        raise ValueError(f"{str(pretrained)!r} is neither a tag of {name} nor a file. {choices}")
    _check_file(name, path)
    return str(path)


def weights_digest(model: nn.Module) -> str:
    """A checksum of all weights and buffers, with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_unresized(path: str, model: nn.Module) -> None:
    """Refuse a file whose position embeddings open_clip had to stretch: it is of a model with another image size."""
    state = model.state_dict()
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            shape = tuple(file.get_slice(key).get_shape())
            if key.endswith("positional_embedding") and shape != tuple(state[key].shape):
                raise ValueError(f"{path} holds another model: its {key} is {shape}, this model's is "
                                 f"{tuple(state[key].shape)}. Load it under the name that it was saved from.")


def _fetch(name: str, tag: str) -> None:
    """Bring the weights of a tag into the local cache, and see that they are fit for this model and no pickle."""
    config = open_clip.get_pretrained_cfg(name, tag)
    wants, has = config.get("quick_gelu", False), open_clip.get_model_config(name).get("quick_gelu", False)
    right = f"{name}-quickgelu" if wants else name.removesuffix("-quickgelu")
    # roberta-ViT-B-32 computes QuickGELU under its only name, and its tag just does not say so
    if wants != has and right != name:
        trained, computes = ("QuickGELU" if quick else "GELU" for quick in (wants, has))
        raise ValueError(f"the weights {tag!r} were trained with {trained}, and {name} computes {computes}: scores "
                         f"would be wrong without a word. Load {right!r}.")
    pickled = f"the weights {tag!r} of {name} are published as a pickle only, and dealkit loads safetensors. "
    pickled += f"Choose another tag: {', '.join(open_clip.list_pretrained_tags_by_model(name))}."
    if not config.get("hf_hub"):
        raise ValueError(pickled)
    try:
        repository, file = os.path.split(config["hf_hub"])
        reach_hub(repository, *([file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]))
        path = open_clip.download_pretrained(config)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean that the file is not here
        raise ConnectionError(f"the weights {tag!r} of {name} are not on this computer and could not be fetched: "
                              f"{error}. Connect once (they are kept), or work offline with "
                              "load_model('birdworld-vit').") from error
    if not str(path).endswith(".safetensors"):
        raise ValueError(pickled)


def _check_file(name: str, path: Path) -> None:
    """Refuse a file that is no safetensors file, or says that it holds another model."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file. Other checkpoints are pickles, which can run code when "
                         "loaded; convert it once where you trust it, with safetensors.torch.save_file.")
    try:
        with safe_open(path, framework="pt") as file:
            saved_as = (file.metadata() or {}).get("model", name)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). Save or fetch it again.") from error
    if saved_as != name:
        raise ValueError(f"{path} holds the weights of {saved_as!r}, not of {name!r}: load_model({saved_as!r}, "
                         "pretrained=path).")
