"""Evaluation: one model, one data set, one bank -> one tidy row, and the tables per image, part and concept behind it.

`embed` puts a data set through the trunk once and keeps the result; `zero_shot` and `retrieval` read it.
`random_maps`, `centre_maps` and `uniform_maps` are explainers that know nothing: rows that belong beside every other.
"""

from dealkit.blind import centre_maps, random_maps, uniform_maps
from dealkit.evaluation.background import background_reliance, background_table
from dealkit.evaluation.discrimination import concept_table, embed_images
from dealkit.evaluation.embeddings import embed, labels_of, zero_shot
from dealkit.evaluation.ranks import retrieval
from dealkit.evaluation.tables import MAP_METRICS, evaluate, image_table, part_table, summarise

__all__ = ["MAP_METRICS", "background_reliance", "background_table", "centre_maps", "concept_table", "embed",
           "embed_images", "evaluate", "image_table", "labels_of", "part_table", "random_maps", "retrieval",
           "summarise", "uniform_maps", "zero_shot"]
