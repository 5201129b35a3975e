"""Packed sequences, the order in which they are drawn, and the check that two sets of them share no document."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray

from endwise.common.axes import TokenMask, Tokens
from endwise.common.errors import DataError
from endwise.common.seeds import numpy_stream
from endwise.common.showing import Shown

_AT_ONCE = 256
"""Sequences that a digest is made of at a time."""


@dataclass(frozen=True, repr=False)
class TokenBatch(Shown):
    """Some sequences of a corpus."""

    tokens: Tokens
    mask: TokenMask
    """True where a position counts: not padding, not a prepended BOS, nor position 0 or what else is left out."""

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Copy to the device. From pinned memory the copy is only issued; later work on its stream follows it."""
        if self.tokens.device == torch.device(device):
            return self
        pinned = self.tokens.is_pinned()
        return type(self)(self.tokens.to(device, non_blocking=pinned), self.mask.to(device, non_blocking=pinned))

    def pinned(self) -> "TokenBatch":
        """Copy into memory that a GPU reads by itself."""
        return type(self)(self.tokens.pin_memory(), self.mask.pin_memory())


@dataclass(frozen=True)
class SequenceLayout:
    """Way in which documents become sequences."""

    context: int
    packing: Literal["stream", "document"] = "stream"
    bos: int | None = None
    """Id put before every sequence; None: none."""
    separator: int | None = None
    """Id that ends documents."""
    mask_first_position: bool = False
    left_out: tuple[tuple[int, int], ...] = ()
    """Ids that do not count, each with how many positions after it do not either; ascending."""
    roles: tuple[str, ...] = ()
    """Roles whose tokens do not count, of conversations."""
    apart: bool = False
    """True where the model is to attend within documents alone; sequences are the same."""

    @property
    def content(self) -> str:
        """All that it says, in words that digests on the disk are made of: no name in here may change. A layout that
        leaves nothing out says nothing of that.
        """
        parts = ("context", "packing", "bos", "separator", "mask_first_position")
        values = ", ".join(f"{part}={getattr(self, part)!r}" for part in parts)
        return f"Layout({values}){self.left_out or ''}{self.roles or ''}{'apart' if self.apart else ''}"

    @property
    def ends(self) -> int | None:
        """Id of the token behind which attention stops, for `LanguageModel.attend_within`; None: it does not stop."""
        return self.separator if self.apart else None

    @property
    def payload(self) -> int:
        """Tokens of text in a full sequence."""
        return self.context - (self.bos is not None)

    @property
    def pad(self) -> int:
        return self.separator or 0


@dataclass(frozen=True)
class Documents:
    """Documents in one array of ids; or rows that were packed before, each of which is held out or left out whole."""

    tokens: NDArray[np.unsignedinteger]
    """All ids, each document's trailing separator included; possibly memory-mapped."""
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    """Hash of each document's ids, separator aside."""
    comparable: NDArray[np.bool_]
    """True where a hash stands for a document; False for fragments too short to say anything."""
    inside: "Documents | None" = None
    """Documents that separators cut each row into, by which they are compared as well; None: these are no rows."""
    left_out: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """Spans `[spans, 2]` of `tokens` that do not count, one after another."""

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, kept: NDArray[np.bool_]) -> "Documents":
        inside = None if self.inside is None else self.inside.where(kept[self.row_of(self.inside)])
        starts, ends, hashes, comparable = self.starts[kept], self.ends[kept], self.hashes[kept], self.comparable[kept]
        return Documents(self.tokens, starts, ends, hashes, comparable, inside, self.left_out)

    def counting(self, part: slice) -> NDArray[np.bool_]:
        """Return which positions of a part of `tokens` count."""
        counts = np.ones(part.stop - part.start, dtype=bool)
        first = int(np.searchsorted(self.left_out[:, 1], part.start, side="right"))
        last = int(np.searchsorted(self.left_out[:, 0], part.stop))
        for begin, end in (self.left_out[first:last] - part.start).tolist():
            counts[max(begin, 0) : end] = False
        return counts

    def row_of(self, inside: "Documents") -> NDArray[np.int64]:
        """The row in which each of the documents lies."""
        return np.searchsorted(self.starts, inside.starts, side="right") - 1


class Corpus(Shown):
    """Sequences of `layout.context` ids, cut out of their documents when asked for.

    `stream` packing joins the documents and cuts the result; an incomplete last sequence is left out. Rows are joined
    with nothing: each is cut by itself, and what is left of it is left out. `document` packing gives every document
    (of rows too, every document in them) sequences of its own, a long one several, padded on the right; a separator
    that does not fit is left out. `limit` keeps the first sequences only.
    """

    def __init__(
        self, documents: Documents, layout: SequenceLayout, name: str = "corpus", limit: int | None = None
    ) -> None:
        self.layout, self.name, self.documents, self._limit = layout, name, documents, limit
        if layout.packing == "document":
            self._starts, self._ends = _pieces(documents.inside or documents, layout)
        else:
            self._starts, self._ends = _spans(documents, layout)
        self._offsets = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        available = int(self._offsets[-1]) // layout.payload if layout.packing == "stream" else len(self._starts)
        self._sequences = available if limit is None else min(available, limit)

    def __len__(self) -> int:
        """Number of sequences."""
        return self._sequences

    def shown_facts(self) -> dict[str, object]:
        return {"": self.name, "tokens": f"{self.tokens:,}", "in": f"{len(self):,} sequences of {self.context}"}

    @property
    def context(self) -> int:
        """Positions per sequence."""
        return self.layout.context

    @property
    def cut_off(self) -> int:
        """Ids of rows that are in no sequence, as what is left of a row fills none."""
        if self.documents.inside is None or self.layout.packing == "document":
            return 0
        return int((self.documents.ends - self.documents.starts).sum() - self._offsets[-1])

    @property
    def tokens(self) -> int:
        """Positions in all, masked ones included: what `training.tokens` and `evaluation.tokens` count."""
        return len(self) * self.context

    def batch(self, indices: Iterable[SupportsIndex]) -> TokenBatch:
        """The sequences at `indices`, on the CPU.

        Raises:
            IndexError: an index is not in `range(len(self))`.
        """
        rows = [self._parts(int(index)) for index in indices]
        documents = self.documents
        bos = int(self.layout.bos is not None)
        tokens = np.full((len(rows), self.context), self.layout.pad, dtype=np.int64)
        mask = np.zeros((len(rows), self.context), dtype=bool)
        for row, parts in enumerate(rows):
            text = np.concatenate([documents.tokens[part] for part in parts])
            tokens[row, bos : bos + len(text)] = text
            mask[row, bos : bos + len(text)] = np.concatenate([documents.counting(part) for part in parts])
        if self.layout.bos is not None:
            tokens[:, 0] = self.layout.bos
        if self.layout.mask_first_position:
            mask[:, 0] = False
        for left_out, after in self.layout.left_out:
            found = tokens == left_out
            for later in range(after + 1):
                mask[:, later:][found[:, : self.context - later]] = False
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(mask))

    def document_starts(self, indices: Iterable[SupportsIndex]) -> TokenMask:
        """Mark where in the sequences at `indices` the first token of a document stands, on the CPU.

        A document begins after a separator, or where the text does. What is cut from text without separators (rows of
        ids, pieces of one long array) are no documents, and have no beginnings.
        """
        rows = [int(index) for index in indices]
        starts = torch.zeros(len(rows), self.context, dtype=torch.bool)
        bos = int(self.layout.bos is not None)
        for row, index in enumerate(rows):
            begin = int(self._starts[index]) if self.layout.packing == "document" else index * self.layout.payload
            end = begin + (1 if self.layout.packing == "document" else self.layout.payload)
            low, high = np.searchsorted(self._beginnings, [begin, end])
            starts[row, torch.from_numpy(self._beginnings[low:high] - begin + bos)] = True
        return starts

    @cached_property
    def _beginnings(self) -> NDArray[np.int64]:
        """Places where documents begin, ascending: in the array of ids or, with stream packing, in the joined text."""
        rows, separator = self.documents, self.layout.separator
        documents = rows.inside or rows
        if separator is None:
            return np.zeros(0, np.int64)
        before = documents.tokens[np.maximum(documents.starts - 1, 0)]
        begin = (documents.starts == 0) | (before == separator)
        if rows.inside is not None:  # what stood before a row, nobody knows
            begin &= ~np.isin(documents.starts, rows.starts)
        starts = documents.starts[begin]
        if self.layout.packing == "document":
            return starts
        span = np.searchsorted(self._starts, starts, side="right") - 1
        within = starts < self._ends[span]
        return (self._offsets[span] + starts - self._starts[span])[within]

    def _parts(self, index: int) -> list[slice]:
        """Find the parts of the documents' ids that a sequence is made of."""
        if not 0 <= index < len(self):
            raise IndexError(f"Sequence {index} of a corpus of {len(self)}.")
        if self.layout.packing == "document":
            return [slice(int(self._starts[index]), int(self._ends[index]))]
        start = index * self.layout.payload
        parts: list[slice] = []
        left = self.layout.payload
        span = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while left:
            begin = int(self._starts[span]) + start - int(self._offsets[span])
            parts.append(slice(begin, min(int(self._ends[span]), begin + left)))
            left -= parts[-1].stop - begin
            start, span = int(self._offsets[span + 1]), span + 1
        return parts

    def fingerprint(self) -> str:
        """Equal for equal documents in equal order, packed alike; 16 hexadecimal digits."""
        digest = hashlib.sha256(f"({self.layout.content}, {len(self)})".encode())
        digest.update(np.ascontiguousarray(self.documents.hashes).tobytes())
        return digest.hexdigest()[:16]

    def digests(self) -> dict[str, str]:
        """Digest the first 1, 2, 4, … documents and all that the sequences are cut from, by how many they are.

        A source that is read only as far as needed has more documents another time; those of before come first. So two
        corpora are of one text where their digests of equally many documents agree.
        """
        count = self._documents_used()
        counts = [1 << power for power in range(count.bit_length()) if 1 << power < count] + [count]
        return {str(each): self.digest_of_first(each) for each in counts}

    def digest_of_first(self, documents: int) -> str:
        """The digest of so many documents, which are all there."""
        digest = hashlib.sha256(self.layout.content.encode())
        digest.update(np.ascontiguousarray(self.documents.hashes[:documents]).tobytes())
        return digest.hexdigest()

    def _documents_used(self) -> int:
        """Count the documents that the sequences reach into, of a corpus that ends before its text does."""
        if self._limit is None or len(self) < self._limit:
            return len(self.documents)
        if self.layout.packing == "document":
            last = int(self._starts[len(self) - 1])
        else:
            place = len(self) * self.layout.payload - 1
            span = int(np.searchsorted(self._offsets, place, side="right")) - 1
            last = int(self._starts[span]) + place - int(self._offsets[span])
        return int(np.searchsorted(self.documents.starts, last, side="right"))

    def text_digest(self, sequences: range) -> str:
        """Digest sequences as a model is given them, with what counts of them: equal for equal text, wherever it comes
        from, that is read alike.
        """
        digest = hashlib.sha256(b"apart" if self.layout.apart else b"")
        for start in range(0, len(sequences), _AT_ONCE):
            batch = self.batch(sequences[start : start + _AT_ONCE])
            digest.update(batch.tokens.numpy().astype("<i8").tobytes())
            digest.update(batch.mask.numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "source": self.name,
            "documents": len(self.documents),
            "sequences": len(self),
            "tokens": self.tokens,
            "context": self.context,
            "fingerprint": self.fingerprint(),
        }


@dataclass(frozen=True, repr=False)
class Corpora(Shown):
    """The two sides, which share no document."""

    train: Corpus
    heldout: Corpus
    dropped: int = 0
    """Documents of the training source that are identical to held-out ones, and so are not trained on."""
    commit: str | None = None
    """Commit of `data.source`, where it is a data set on the hub."""

    def __post_init__(self) -> None:
        check_disjoint(self.train, self.heldout)

    def describe(self) -> dict[str, Any]:
        return {"train": self.train.describe(), "heldout": self.heldout.describe(), "dropped_duplicates": self.dropped}

    def __str__(self) -> str:
        lines = [
            f"{side}: {corpus.name}, {len(corpus.documents):,} documents, {corpus.tokens:,} tokens in {len(corpus):,} "
            f"sequences of {corpus.context}, fingerprint {corpus.fingerprint()}"
            for side, corpus in (("training", self.train), ("held out", self.heldout))
        ]
        if self.dropped:
            what = "documents" if self.train.documents.inside is None else "rows"
            lines.append(f"{self.dropped:,} training {what} are identical to held-out ones and were left out.")
        lines += [
            f"{corpus.name}: {corpus.cut_off:,} ids at the ends of rows fill no sequence and were left out."
            for corpus in (self.train, self.heldout)
            if corpus.cut_off
        ]
        return "\n".join(lines)


class BatchOrder:
    """Sequences that each batch holds, by the batch's number alone: the cursor of a run is one integer.

    Every epoch is a permutation of its own, drawn from the seed and the epoch's number. Batches are cut from the epochs
    laid end to end, so a batch may hold the last sequences of one epoch and the first of the next; only what is left
    after the last epoch is not drawn. So the place in the data is known from the step, whatever was read before.
    """

    def __init__(self, corpus: Corpus, batch: int, seed: int, epochs: int = 1) -> None:
        self._sequences, self._batch, self._epochs = len(corpus), batch, epochs
        self._permutation = lru_cache(maxsize=2)(
            lambda epoch: numpy_stream(seed, "order", epoch).permutation(self._sequences)
        )

    def __len__(self) -> int:
        """Number of full batches."""
        return self._sequences * self._epochs // self._batch

    def __getitem__(self, number: int) -> list[int]:
        if not 0 <= number < len(self):
            raise IndexError(f"Batch {number} of {len(self)}.")
        positions = range(number * self._batch, (number + 1) * self._batch)
        return [int(self._permutation(p // self._sequences)[p % self._sequences]) for p in positions]


def check_disjoint(train: Corpus, heldout: Corpus) -> None:
    """Verify that no held-out document is trained on. Documents are compared by a 64-bit hash of their ids.

    Raises:
        DataError: some are on both sides.
    """
    shared = int(shared_with(train.documents, heldout.documents).sum())
    if shared:
        raise DataError(
            f"Training and held-out text must not overlap, but {shared:,} documents of {train.name} are also in "
            f"{heldout.name}. Set data.heldout or data.heldout_split to other text."
        )


def shared_with(documents: Documents, others: Documents) -> NDArray[np.bool_]:
    """Mark those of `documents` that are identical to one of `others`. A row is, too, if a document in it is."""
    shared = documents.comparable & np.isin(documents.hashes, compared(others))
    if documents.inside is not None:
        inside = documents.inside
        shared[documents.row_of(inside)[shared_with(inside, others)]] = True
    return shared


def compared(documents: Documents) -> NDArray[np.uint64]:
    """Hashes of what is compared with other documents: rows, and what is in them."""
    own = documents.hashes[documents.comparable]
    return own if documents.inside is None else np.concatenate([own, compared(documents.inside)])


def _spans(documents: Documents, layout: SequenceLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Neighbouring documents joined: usually one span holds them all. Of each row, what fills whole sequences."""
    starts, ends = documents.starts, documents.ends
    if documents.inside is not None:
        return starts, starts + (ends - starts) // layout.payload * layout.payload
    breaks = starts[1:] != ends[:-1]
    return starts[np.concatenate([[True], breaks])], ends[np.concatenate([breaks, [True]])]


def _pieces(documents: Documents, layout: SequenceLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each document cut into pieces of at most the payload; none for a separator alone."""
    starts, ends = documents.starts, documents.ends
    separated = documents.tokens[ends - 1] == (-1 if layout.separator is None else layout.separator)
    counts = -(-(ends - starts - separated) // layout.payload)
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    piece_starts = np.repeat(starts, counts) + within * layout.payload
    return piece_starts, np.minimum(piece_starts + layout.payload, np.repeat(ends, counts))
