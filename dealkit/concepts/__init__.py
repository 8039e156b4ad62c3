"""Concepts: which visible features describe each category, who wrote them down, and whether they are any good.

DEAL explains an image by concepts such as "black cap" instead of by its category alone. Nobody annotates them: a
language model is asked once per category. `language` holds the question and reads the reply, `extraction` asks it of a
server, `bank` keeps the answers with their provenance in a JSON file, `checks` holds the rules of a good bank.
"""
from dealkit.concepts.bank import ConceptBank, MissingCategory, category_name, load_concepts
from dealkit.concepts.checks import RULES, check_concepts
from dealkit.concepts.extraction import ExtractionError, extract_concepts
from dealkit.concepts.language import concept_prompt, parse_concepts

__all__ = ["RULES", "ConceptBank", "ExtractionError", "MissingCategory", "category_name", "check_concepts",
           "concept_prompt", "extract_concepts", "load_concepts", "parse_concepts"]
