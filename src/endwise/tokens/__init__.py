"""From a source of text or token ids to packed sequences: `corpora_for` and `load_corpora` are the way in.

What counts as a document:

| source                              | a document is                                                                 |
|-------------------------------------|-------------------------------------------------------------------------------|
| `.txt`                              | lines up to a blank line (use `.jsonl` for documents that hold blank lines)   |
| `.jsonl`, `.parquet`, HF dataset    | one row: its text, or its token ids                                           |
| rows of ids, all of one length that | already packed: taken as they are, no separator is added, documents end at    |
| is at least the context; 2-D `.npy` | separators and rows                                                           |
| 1-D `.npy`                          | tokens up to a separator; without any, content-defined pieces (see `store`)   |
| `embedded`                          | tokens up to EOS; decoded and tokenised again for a model of other vocabulary |

Documents are stored once per source and tokenizer, as a memory-mapped array of ids beside each document's end and
hash (`store`). Sequences are cut out of that array when a batch is asked for (`corpus`), so that starting costs no
pass over the tokens. Held-out documents are set apart before packing; whatever is identical to one of them leaves the
training side, and `check_disjoint` verifies the result.
"""

from endwise.tokens.corpus import BatchOrder, Corpora, Corpus, TokenBatch, check_disjoint
from endwise.tokens.loading import corpora_for, load_corpora
from endwise.tokens.prefetch import read_ahead

__all__ = [
    "BatchOrder",
    "Corpora",
    "Corpus",
    "TokenBatch",
    "check_disjoint",
    "corpora_for",
    "load_corpora",
    "read_ahead",
]
