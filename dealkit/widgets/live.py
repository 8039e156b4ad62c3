"""The losses of a run while it goes on."""
from __future__ import annotations

import time

import ipywidgets
import pandas as pd
from IPython.display import display

from dealkit import plots


class LossPlot:
    """Pass it to `finetune(..., callback=LossPlot())`: three panels under the cell, drawn again every few seconds.

    Args:
        seconds: between two drawings, at least. A drawing takes about a quarter of a second of the processor.
        name: of the curves.

    Attributes:
        rows: what the callback was given, one dict a step; `plots.histories({name: pd.DataFrame(rows)})` draws the same
            without a widget.

    Example:
        >>> finetune(vlm, train, bank, config, callback=LossPlot())    # doctest: +SKIP
    """

    def __init__(self, seconds: float = 5.0, name: str = "this run"):
        self.seconds, self.name, self.rows = seconds, name, []
        self.picture = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self._drawn = None

    def __call__(self, row: dict) -> None:
        """One more step."""
        self.rows.append(dict(row))
        if self._drawn is None:
            display(self.picture)
        if self._drawn is None or time.monotonic() - self._drawn >= self.seconds:
            self.draw()

    def draw(self) -> None:
        """Draw what there is now; `finetune` ends without a call, so call this for the very last steps."""
        if not self.rows:       # a run that was resumed when it was done takes no step
            return
        self.picture.value = plots.png(plots.histories({self.name: pd.DataFrame(self.rows)}), dpi=60)
        self._drawn = time.monotonic()
