"""The settings of one fine-tuning run."""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DealConfig:
    """Settings of one fine-tuning run. The defaults are the paper's form and released weights; `concept_captions`
    is ours.

    Args:
        lambda_disentangle, gamma_localize: weights of the two regularisers; both 0 is contrastive-only fine-tuning.
        overlap: "product" (the paper's) or "cosine", see `disentangle_loss`.
        aggregate: "sum" (the paper's) or "max", see `localize_loss`.
        guard, guard_share: weight of `guard_loss` against dead maps, and the share of positive relevance it asks for.
        stop_text_gradient: the regularisers do not move the text tower.
        detach_maps: cut the gradient of the maps, as the released code does; kept as a control.
        method: explanation method; None for the tower's own (see `explain`).
        concept_captions: share in [0, 1] of the training captions that mention concepts (drawn from the bank).
        category_prompt: the text of a category, the same in training and in evaluation.
        lr, weight_decay, betas, eps: Adam's settings.
        epochs, batch_size, seed: the seed fixes order and captions.
            `batch_size` is that of all processes together: each takes its share.
        freeze_text: do not train the text tower at all; the texts of the bank are then encoded once.
        precision: what towers compute in: "float32", or "bfloat16" or "float16" by autocast. The weights stay float32
            in any case, and so do maps and losses. Prefer bfloat16; float16 is for older GPUs (T4, V100), and leaves
            out a step whose gradients overflow, which the history counts.
        checkpoint_activations: recompute what lies inside the blocks of the towers in the backward pass instead of
            keeping it: much less memory for about a third more time, the same gradients.

    Raises:
        ValueError: for a negative or NaN weight, a non-positive learning rate, an unknown option.
    """

    lambda_disentangle: float = 0.1
    gamma_localize: float = 0.01
    overlap: str = "product"
    aggregate: str = "sum"
    guard: float = 0.0
    guard_share: float = 0.3
    stop_text_gradient: bool = False
    detach_maps: bool = False
    method: str | None = None
    concept_captions: float = 0.6
    category_prompt: str = "a photo of a {}"
    lr: float = 5e-7
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    epochs: int = 1
    batch_size: int = 32
    freeze_text: bool = False
    seed: int = 0
    precision: str = "float32"
    checkpoint_activations: bool = False

    def __post_init__(self):
        for name in ("lambda_disentangle", "gamma_localize", "guard", "weight_decay"):
            value = getattr(self, name)
            if not (_is_finite(value) and value >= 0):
                raise ValueError(f"{name} is {value!r}; a weight is a finite number >= 0 (0 switches the term off)")
        if not (_is_finite(self.lr) and self.lr > 0):
            raise ValueError(f"lr is {self.lr!r}; the learning rate is a finite number > 0")
        for name, least in (("epochs", 1), ("batch_size", 2), ("seed", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} is {value!r}; it must be a whole number >= {least}")
        for name in ("concept_captions", "guard_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in [0, 1]")
        for name, known in (("overlap", ("product", "cosine")), ("aggregate", ("sum", "max")),
                            ("precision", PRECISIONS), ("checkpoint_activations", (False, True))):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {known}")
        if self.category_prompt.count("{}") != 1:
            raise ValueError(f"category_prompt is {self.category_prompt!r}; it needs one {{}} for the category")

    @property
    def contrastive_only(self) -> DealConfig:
        """The control: the same data, captions, order and steps without any regulariser."""
        return replace(self, lambda_disentangle=0.0, gamma_localize=0.0, guard=0.0)


def _is_finite(value) -> bool:
    """A finite number, and not its text: settings that come from a file may be "1e-4"."""
    return isinstance(value, (int, float)) and math.isfinite(value)
