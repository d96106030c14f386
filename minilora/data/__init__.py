"""Everything between a text and a training step: shipped corpora, the character tokenizer, and batches.
The folder exists so that a lesson can start offline, from data whose origin and every byte are accounted for.
"""

# ruff: noqa: F401  (the names that the package offers)

from .batches import fixed_batches, random_batches
from .corpora import CORPORA, Corpus, load_corpus, load_text, read_text_file, split_text
from .tokenizer import ALPHABET, CharTokenizer
