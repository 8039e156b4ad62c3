"""Captum's attribution methods, with the signature of `dealkit.explain`: second opinions on the same score.

All of them explain the cosine of image and text, and all return maps `[B, K, h, w]` on the tower's grid, so that they
can be compared with `explain` and scored by the same metrics. None is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, LayerGradCam
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor
from tqdm.auto import tqdm

from dealkit.maps import cosines, embed_texts
from dealkit.models import VLM, Split

METHODS = ("layer_gradcam", "input_x_gradient", "integrated_gradients", "occlusion")


def attribute(vlm: VLM, images: Tensor, texts: Sequence[str] | Sequence[Sequence[str]] | Tensor,
              method: str = "integrated_gradients", steps: int = 32, batch_size: int = 32,
              progress: bool = False) -> Tensor:
    """Explain the score of each image with each text by one of Captum's methods.

    What each method can and cannot say:

    - "layer_gradcam" (Selvaraju et al., 2017) weighs the channels of the last feature map. Cheap; as coarse as that
      map, and blind to what cancels in a channel's mean gradient. ResNets only.
    - "input_x_gradient" (Shrikumar et al., 2016) multiplies the explained variable by its gradient; on a CLS-pooled ViT
      that is `explain`'s "relevance". It says what the last block reads, not what earlier blocks mixed into the tokens.
    - "integrated_gradients" (Sundararajan et al., 2017) follows the score along a straight path from the mean colour to
      the image; the pixels' shares, before the ReLU, add up to the difference in score. It sees the whole network, but
      depends on the baseline: a part that has the baseline's colour gets nothing.
    - "occlusion" (Zeiler and Fergus, 2014) covers one grid cell at a time with the mean colour and measures the drop.
      No gradients, nothing to saturate; it misses evidence that is present twice, and the patch itself is unnatural.
      Captum's Occlusion takes one text at a time; the same numbers come from its feature ablation of the cells, which
      shows each covered image to all texts.

    Methods on pixels keep the positive part of the sum over colours, averaged over each grid cell. The mean colour is 0
    after the model's normalisation (black on Birdworld, whose images are not normalised).

    Args:
        vlm: the model.
        images: `[B, 3, H, W]`, normalised for the model.
        texts: as for `explain`: K texts, B lists of K texts, or embeddings `[K, D]` or `[B, K, D]`.
        method: one of the four above.
        steps: points on the path of integrated gradients.
        batch_size: most images in one forward pass; lower it when memory runs out.
        progress: show a progress bar. Integrated gradients cost K x steps passes an image, occlusion h*w + 1 for any K.

    Returns:
        `[B, K, h, w]`, non-negative, without gradient.

    Raises:
        TypeError, ValueError: unusable images, texts, steps or batch size; a method that is unknown or does not apply.
        NotImplementedError: an image tower without a cut.

    Example:
        >>> attribute(vlm, images, ["red head"], method="occlusion").shape
        torch.Size([8, 1, 10, 10])
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    tower = vlm.tower
    if method == "layer_gradcam" and not isinstance(tower.visual, ModifiedResNet):
        raise ValueError("'layer_gradcam' reads layer4 of CLIP's ResNet, which this tower, "
                         f"{tower.family}, does not have. Use explain(vlm, images, texts, method='gradcam').")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1; they are {steps} and {batch_size}.")
    images = vlm.check_images(images)
    with torch.inference_mode(False):
        with torch.no_grad():
            text_emb = embed_texts(vlm, texts, len(images)).expand(len(images), -1, -1)  # [B, K, D]
            images = images.clone() if images.is_inference() else images.detach()
        rows = []
        with tqdm(total=text_emb.shape[1] * len(images), desc=method, disable=not progress) as bar, torch.enable_grad():
            for batch, embeddings in zip(images.split(batch_size), text_emb.split(batch_size)):
                if method == "occlusion":
                    rows.append(_occlude(vlm, batch, embeddings, batch_size))
                    bar.update(embeddings.shape[1] * len(batch))
                    continue
                explainer = _explainer(vlm, batch, method, steps, batch_size)
                columns = []
                for column in embeddings.unbind(dim=1):
                    columns.append(explainer(column).detach())
                    bar.update(len(batch))
                rows.append(torch.stack(columns, dim=1))
        return torch.cat(rows).to(images.dtype)


def _explainer(vlm: VLM, images: Tensor, method: str, steps: int, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Set a method up for one batch: a function from one text embedding per image, `[B, D]`, to maps `[B, h, w]`."""
    if method == "input_x_gradient":
        with torch.no_grad():
            split = vlm.tower.split(images)
        variable = split.variable.detach().requires_grad_()
        captum = InputXGradient(lambda variable, text: _score(split.head(variable), text))
        return lambda text: _from_variable(
            captum.attribute(variable, additional_forward_args=text), split, vlm.grid)

    def forward(pixels: Tensor, text: Tensor) -> Tensor:
        return _score(vlm.model.encode_image(pixels, normalize=False), text)

    if method == "layer_gradcam":
        captum = LayerGradCam(forward, vlm.model.visual.layer4)
        return lambda text: captum.attribute(images, additional_forward_args=text, relu_attributions=True)[:, 0]
    captum = IntegratedGradients(forward)
    return lambda text: _from_pixels(captum.attribute(
        images, additional_forward_args=text, n_steps=steps, internal_batch_size=batch_size), vlm.grid)


def _occlude(vlm: VLM, images: Tensor, text_emb: Tensor, batch_size: int) -> Tensor:
    """The drop of each text's score when a grid cell is covered: `[B, K, D]` embeddings -> `[B, K, h, w]`.

    Captum ablates a grid of ones that lets the pixels through.
    """
    def forward(seen: Tensor, pixels: Tensor, texts: Tensor) -> Tensor:
        covered = pixels * F.interpolate(seen, pixels.shape[-2:], mode="nearest")
        return cosines(vlm.model.encode_image(covered, normalize=False), texts)  # [images, K]

    drops = FeatureAblation(forward).attribute(
        images.new_ones(len(images), 1, *vlm.grid), additional_forward_args=(images, text_emb),
        perturbations_per_eval=max(1, batch_size // len(images)))
    return drops.unflatten(0, text_emb.shape[:2])[:, :, 0].relu()  # one row for each image and text


def _score(embedding: Tensor, text: Tensor) -> Tensor:
    """The cosine of each image with its own text: `[B, D]`, `[B, D]` -> `[B]`."""
    return cosines(embedding, text[:, None])[:, 0]


def _from_variable(products: Tensor, split: Split, grid: tuple[int, int]) -> Tensor:
    """Gradient times variable -> `[B, h, w]`: patches of the pooling row, mean over heads, or summed over channels."""
    if split.kind == "attention":
        return products.relu().mean(dim=1)[:, split.prefix:].unflatten(1, grid)
    return products.sum(dim=1).relu()


def _from_pixels(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Shares of the score per pixel and colour, `[B, 3, H, W]` -> positive shares on the grid, `[B, h, w]`."""
    return F.adaptive_avg_pool2d(shares.sum(dim=1, keepdim=True).relu(), grid)[:, 0]
