"""Path from a source of text or token ids to packed sequences: `corpora_for` and `load_corpora` are the way in.

What counts as a document:

| source                              | a document is                                                                 |
|-------------------------------------|-------------------------------------------------------------------------------|
| `.txt`, `.txt.gz`                   | lines up to a blank line (use `.jsonl` for documents that hold blank lines)   |
| `.jsonl`(`.gz`), `.parquet`, HF     | one row: its text, or its token ids; null is no document                      |
| `.json`(`.gz`)                      | one entry of its list; in a folder only where no file is of another kind      |
| rows of ids, all of one length that | already packed: cut into sequences row by row, nothing joined or added; what  |
| fills a sequence; 2-D `.npy`        | is left of a row fills none and is left out; held out and dropped whole       |
| 1-D `.npy`                          | tokens up to a separator; without any, content-defined pieces (see `store`)   |
| `embedded`                          | tokens up to EOS; decoded and tokenised again for a model of other vocabulary |

Text is text: a special token that is written out in it is not that token, unless `data.special_tokens` says so.

Documents are stored once per source and tokenizer, as a memory-mapped array of ids beside each document's end and
hash (`store`). Sequences are cut out of that array when a batch is asked for (`corpus`), so that starting costs no
pass over the tokens. Held-out documents are set apart before packing; whatever is identical to one of them leaves the
training side, and `check_disjoint` verifies the result.
"""

from endwise.tokens.corpus import BatchOrder, Corpora, Corpus, TokenBatch, check_disjoint
from endwise.tokens.loading import check_readable, corpora_for, load_corpora
from endwise.tokens.prefetch import read_ahead

__all__ = [
    "BatchOrder",
    "Corpora",
    "Corpus",
    "TokenBatch",
    "check_disjoint",
    "check_readable",
    "corpora_for",
    "load_corpora",
    "read_ahead",
]
