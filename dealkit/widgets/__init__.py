"""What a reader plays with in a notebook. Everything shown here can be had without a widget from the same functions."""
from dealkit.widgets.editor import ConceptEditor
from dealkit.widgets.explorer import Explorer
from dealkit.widgets.live import LossPlot

__all__ = ["ConceptEditor", "Explorer", "LossPlot"]
