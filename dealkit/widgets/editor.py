"""A category's concepts, edited and judged at once."""
from __future__ import annotations

from html import escape

import ipywidgets
import pandas as pd

from dealkit import plots
from dealkit.concepts import ConceptBank, check_concepts
from dealkit.evaluation import concept_table, embed_images


class ConceptEditor(ipywidgets.VBox):
    """Edit a category's concepts, one a line, and watch the rules and the similarities to images change.

    Every change makes a new `bank` whose provenance lists the edited categories under `hand_edits`; the bank that came
    in stays as it was. What goes wrong (a word that the model does not know, an empty list) is said in the widget.

    Args:
        bank: the ConceptBank to begin with.
        vlm: the model that judges the similarities.
        dataset: items with image and label, whose `categories` are the bank's.
        images: how many of its images, evenly spread, are compared with.

    Example:
        >>> editor = ConceptEditor(setup.bank, setup.vlm, setup.test)       # as the last line of a cell
        >>> editor.bank.save("my-bank.json")
    """

    def __init__(self, bank: ConceptBank, vlm, dataset, images: int = 320):
        self.bank, self._original, self._vlm, self._categories = bank, bank, vlm, dataset.categories
        self._embedded = embed_images(vlm, dataset, images)
        self.category = ipywidgets.Dropdown(options=bank.categories, description="category")
        self.text = ipywidgets.Textarea(description="concepts", rows=7, layout={"width": "420px"})
        self.reset = ipywidgets.Button(description="as it was", tooltip="Undo the edits of this category")
        self.checks = ipywidgets.HTML(layout={"margin": "0 0 0 16px"})
        self.picture = ipywidgets.Image(format="png", layout={"width": "auto", "align_self": "flex-start"})
        left = ipywidgets.VBox([self.category, self.text, self.reset], layout={"flex": "0 0 auto"})
        super().__init__([ipywidgets.HBox([left, self.checks]), self.picture])
        self.category.observe(lambda change: self._load(), "value")
        self.text.observe(lambda change: self._edit(), "value")
        self.reset.on_click(lambda button: self._load(self._original))
        self._load()

    def _load(self, bank: ConceptBank | None = None) -> None:
        lines = "\n".join((bank or self.bank)[self.category.value])
        if self.text.value == lines:
            self._draw()                 # the same text triggers no event, but the category may be another
        else:
            self.text.value = lines

    def _edit(self) -> None:
        category = self.category.value
        concepts = [line.strip() for line in self.text.value.splitlines() if line.strip()]
        edited = dict(self.bank.concepts) | {category: concepts}
        changed = [name for name in edited if edited[name] != self._original.concepts[name]]
        before = self._original.provenance.get("hand_edits", [])
        edits = list(dict.fromkeys([*([before] if isinstance(before, str) else before), *changed]))
        self.bank = ConceptBank(self.bank.name, edited, self._original.provenance | {"hand_edits": edits})
        self._draw()

    def _draw(self) -> None:
        category = self.category.value
        faults = check_concepts(self.bank)
        faults = faults[faults["category"] == category]
        lines = [f"<li><b>{escape(row.rule)}</b>: {escape(row.concept or 'the list')}, {escape(row.detail)}</li>"
                 for row in faults.itertuples()]
        self.checks.value = f"<b>Rules broken: {len(lines)}</b><ul>{''.join(lines)}</ul>"
        shown = "block"
        try:
            self.picture.value = plots.png(plots.concept_bars(self.similarities(), title=category))
        except ValueError as error:      # no concepts, or a word that a small vocabulary lacks
            self.checks.value += f"<b>No similarities:</b> {escape(str(error))}"
            shown = "none"
        self.picture.layout.display = shown

    def similarities(self) -> pd.DataFrame:
        """`concept_table` of the chosen category as it stands now."""
        category = self.category.value
        if not self.bank[category]:
            raise ValueError("write at least one concept, one a line")
        only = ConceptBank(self.bank.name, {category: self.bank[category]})      # a bank: it knows class names too
        return concept_table(self._vlm, self._embedded, self._categories, only)
