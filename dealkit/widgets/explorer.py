"""One image and a few concepts, seen through several models side by side."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

import ipywidgets
import pandas as pd
import torch

from dealkit import plots
from dealkit.concepts import ConceptBank
from dealkit.datasets.pictures import open_picture
from dealkit.evaluation.columns import named_parts
from dealkit.inputs import category_names
from dealkit.maps import explain
from dealkit.metrics import mass_in_mask, pointing_game
from dealkit.models import VLM


class Explorer(ipywidgets.VBox):
    """Pick or upload an image, type concepts, and see where each model looks for them, side by side.

    Shown are the maps, one row a model; the overlap of the maps; and, where the image has part masks and a concept
    names a part, how well its map hits that part. What goes wrong is said in the widget.

    Args:
        models: name -> VLM, e.g. {"before": ..., "after DEAL": ...}; all are asked the same.
        dataset: images to pick from (items with image, and part_masks where known); None leaves only upload. Those of
            `Photographs` fit models of any input size, others must be images for all of the models.
        concepts: what stands in the field at first. None takes those of the first image's category from `bank`.
        bank: with it, choosing an image of the data set fills in its category's concepts, where the bank has any.

    Raises:
        TypeError: models that are not such a mapping, concepts that are not a list, a bank that is none.
        ValueError: no model, an empty data set, or models without a method in common.

    Example:
        >>> Explorer({"before": dealkit.load_model("birdworld-vit"), "after": vlm}, setup.test, bank=setup.bank)
    """

    def __init__(self, models: Mapping[str, VLM], dataset=None, concepts: list[str] | None = None,
                 bank: ConceptBank | None = None):
        _check(models, dataset, concepts, bank)
        self._models, self._dataset, self._bank = dict(models), dataset, bank
        self._picture = None                                             # an uploaded one, instead of the data set's
        self.result = pd.DataFrame()
        self._build(concepts or [])
        self.index.observe(lambda change: self._choose(), "value")
        self.back.on_click(lambda button: self._choose())
        self.upload.observe(lambda change: self._take(), "value")
        for control in (self.text, self.method, self.shown):
            control.observe(lambda change: self._draw(), "value")
        self.again.on_click(lambda button: self._draw())
        if dataset is not None and not concepts:
            self._choose()
        else:
            self._draw()

    def _build(self, concepts: list[str]) -> None:
        """The controls on the left, messages and scores beside them, the two pictures below."""
        last = len(self._dataset) - 1 if self._dataset is not None else 0
        self.index = ipywidgets.BoundedIntText(0, min=0, max=last, description="image",
                                               tooltip=f"a number from 0 to {last}")
        self.upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="or your own")
        self.back = ipywidgets.Button(description="back to the data set", tooltip="Leave the uploaded picture",
                                       layout={"width": "auto"})
        self.text = ipywidgets.Textarea("\n".join(concepts), description="concepts", rows=6, placeholder="one a line",
                                        continuous_update=False, layout={"width": "320px"})  # a half word is unknown
        self.again = ipywidgets.Button(description="show maps", tooltip="Draw everything anew")
        self.method = ipywidgets.Dropdown(options=_shared_methods(self._models), description="method")
        self.shown = ipywidgets.SelectMultiple(options=list(self._models), value=tuple(self._models),
                                               description="models", rows=min(4, len(self._models)))
        self.message = ipywidgets.HTML(layout={"margin": "0 0 0 16px"})
        fit = {"width": "auto", "max_width": "100%", "align_self": "flex-start"}
        self.maps = ipywidgets.Image(format="png", layout=fit)
        self.overlaps = ipywidgets.Image(format="png", layout=fit)
        pick = [self.upload] if self._dataset is None else [self.index, ipywidgets.HBox([self.upload, self.back])]
        left = ipywidgets.VBox([*pick, self.text, self.method, self.shown, self.again], layout={"flex": "0 0 auto"})
        super().__init__([ipywidgets.HBox([left, self.message]), self.maps, self.overlaps])

    def _choose(self) -> None:
        """An image of the data set: with its category's concepts, if there is a bank that has them."""
        self._picture = None
        if isinstance(self.upload.value, tuple):                         # ipywidgets 8 may forget the file, so that the
            self.upload.value = ()                                       # same one can be uploaded again; 7 may not
        self._guard(self._fill_in)

    def _fill_in(self) -> None:
        remark = ""
        if self._bank is not None:
            category = category_names(self._dataset)[self._dataset[self.index.value]["label"]]
            concepts = "\n".join(self._bank[category] if category in self._bank else [])
            if concepts and self.text.value != concepts:
                self.text.value = concepts                               # its event draws
                return
            remark = "" if concepts else (f"The bank has no concepts for {category!r}, the category of this image; "
                                          "those in the field stay as they are.")
        self._draw(remark)

    def _take(self) -> None:
        """An uploaded picture. ipywidgets 8 hands over a tuple of files, 7 a dict of them."""
        def take() -> None:
            files = self.upload.value
            if files:
                self._picture = bytes((list(files.values()) if isinstance(files, dict) else list(files))[0]["content"])
                self._draw()

        self._guard(take)

    def _draw(self, remark: str = "") -> None:
        """Draw everything anew, with the remark above whatever else there is to say."""
        def draw() -> None:
            said = self._explain()
            self.message.value = "<br>".join(filter(None, [escape(remark), said]))
            self.maps.layout.display = self.overlaps.layout.display = "block"

        self._guard(draw, remark)

    def _guard(self, handler: Callable[[], None], remark: str = "") -> None:
        """Run a handler; what goes wrong is said in the widget, and no picture of something else stays."""
        try:
            handler()
        except Exception as error:       # any: Jupyter would put it into a log that nobody has open, and show old maps
            self.message.value = "<br>".join(filter(None, [escape(remark), f"<b>{escape(_sentence(error))}</b>"]))
            self.result, self.maps.layout.display, self.overlaps.layout.display = pd.DataFrame(), "none", "none"

    def _explain(self) -> str:
        """Compute the maps, both pictures and the scores; returns what there is to say in HTML."""
        concepts, names = self._asked()
        images, maps, masks, notes = [], [], None, []
        if self._picture is not None:
            picture, notes = open_picture(self._picture)
        elif self._dataset is None:
            raise ValueError("Upload a picture to begin.")
        else:
            picture = self._dataset.pictures[self.index.value] if hasattr(self._dataset, "pictures") else None
        for vlm in (self._models[name] for name in names):
            item = self._dataset[self.index.value] if picture is None else {"image": vlm.preprocess(picture)}
            maps.append(explain(vlm, item["image"][None], concepts, self.method.value).cpu())
            images.append(vlm.unnormalise(item["image"]))
            masks = self._masks(item, concepts)
        drawn = None if masks is None else [masks[0]] * len(names)
        grids = plots.map_grid(images, [m[0] for m in maps], concepts, drawn, rows=names)
        pictures = plots.png(grids, dither=True), plots.png(plots.overlap_matrices(maps, concepts, names))
        self.maps.value, self.overlaps.value = pictures                  # together: never one new and one old for long
        scores = [] if masks is None else [
            (name, concept, peak, mass) for name, m in zip(names, maps)
            for concept, peak, mass in zip(concepts, pointing_game(m, masks, reduction="none")[0].tolist(),
                                           mass_in_mask(m, masks, reduction="none")[0].tolist())]
        self.result = pd.DataFrame(scores, columns=["model", "concept", "peak in part", "mass in part"])
        return "<br>".join([*map(escape, notes), self._scores_html(concepts, names) if scores else ""])

    def _asked(self) -> tuple[list[str], list[str]]:
        """The concepts in the field and the names of the models chosen, without blanks and repeats."""
        concepts = list(dict.fromkeys(line.strip() for line in self.text.value.splitlines() if line.strip()))
        names = list(self.shown.value)
        if not concepts or not names:
            raise ValueError("Type at least one concept, one a line." if names else "Choose at least one model.")
        if len(concepts) > 8:
            raise ValueError(f"{len(concepts)} concepts are more than fit beside each other; keep at most 8.")
        return concepts, names

    def _scores_html(self, concepts: list[str], names: list[str]) -> str:
        """The scores as a table, a row a concept, the models beside each other under each score."""
        table = self.result.pivot(index="concept", columns="model").reindex(concepts).reindex(columns=names, level=1)
        table.columns.names, table.index.name = [None, None], None
        return table.round(2).to_html(na_rep="no part named", index_names=False)

    def _masks(self, item: dict, concepts: list[str]) -> torch.Tensor | None:
        """True masks [1, K, H, W] of the parts that the concepts name, empty for those that name none; or None."""
        if "part_masks" not in item:
            return None
        named = named_parts([concepts], list(self._dataset.parts))[0]                  # [K, P]
        return (item["part_masks"] & named[..., None, None]).any(dim=1)[None]


def _check(models, dataset, concepts, bank) -> None:
    """Refuse at once what could only fail at every click."""
    example = "expected name -> VLM, e.g. models={'CLIP': dealkit.load_model('birdworld-vit')}"
    if not isinstance(models, Mapping):
        raise TypeError(f"models is a {type(models).__name__}; {example}.")
    if not models:
        raise ValueError(f"no model to look with; {example}.")
    for name, vlm in models.items():
        if not isinstance(vlm, VLM):
            raise TypeError(f"models[{name!r}] is a {type(vlm).__name__}; {example}.")
    if isinstance(concepts, str):
        raise TypeError(f"concepts is one string; expected a list of them, e.g. concepts=[{concepts!r}].")
    if bank is not None and not isinstance(bank, Mapping):
        raise TypeError(f"bank is a {type(bank).__name__}; expected a ConceptBank, e.g. load_concepts('birdworld').")
    if dataset is not None and len(dataset) == 0:
        raise ValueError("the data set is empty; pass one with an image or more, or None to upload pictures only.")


def _shared_methods(models: dict[str, VLM]) -> list[str]:
    first, *others = [vlm.tower.methods for vlm in models.values()]
    shared = [method for method in first if all(method in methods for methods in others)]
    if not shared:
        raise ValueError("the models have no explanation method in common; look at them one after the other")
    return shared


def _sentence(error: Exception) -> str:
    """An error in words; of those that are not ours, like "'red'" of a KeyError, the text alone would puzzle."""
    text = str(error)
    ours = isinstance(error, (ValueError, TypeError, OSError, RuntimeError, ImportError)) and text
    return text if ours else f"{type(error).__name__}: {text}".rstrip(": ")
