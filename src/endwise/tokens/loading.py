"""Path from a recipe's `data` section to the two corpora of a run."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import as_file, files
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from endwise.common.digests import cache_folder
from endwise.common.errors import DataError, NoTokenizer
from endwise.common.files import expanded, there_is
from endwise.config.run import DataConfig
from endwise.tokens.chats import no_roles
from endwise.tokens.corpus import Corpora, Corpus, Documents, SequenceLayout, compared, shared_with
from endwise.tokens.encoding import Encoding, outside_vocabulary, special_ids
from endwise.tokens.folders import DEFAULT_SPLIT, no_split
from endwise.tokens.readers import ROWS_AT_ONCE, Document
from endwise.tokens.sources import TextSource, on_hub, open_source, refuse_hub_settings
from endwise.tokens.store import open_store
from endwise.tokens.tokenising import Quota, documents_in, held_by_hash

EMBEDDED = "embedded"
EMBEDDED_EOS = 0


@runtime_checkable
class Reader(Protocol):
    """Reader of tokens: as much of a language model as loading text needs."""

    @property
    def tokenizer(self) -> Any | None: ...
    @property
    def no_tokenizer(self) -> str: ...
    @property
    def context(self) -> int | None: ...
    @property
    def vocab_size(self) -> int: ...


def check_readable(data: DataConfig) -> None:
    """Read the first document of each source: what is missing, or of another kind, is known before long work. Where the
    hub does not answer, a data set that it was asked for before may be kept, and is not read.

    Raises:
        DataError: one cannot be read.
    """
    sides = (data.source, data.split), (data.heldout or data.source, data.heldout_split or data.split)
    for name, split in dict.fromkeys(each for each in sides if each[0] != EMBEDDED):
        config, revision = (data.dataset_config, data.revision) if name == data.source else (None, None)
        source = open_source(name, data.column, config, split, data.streaming, revision)
        if not there_is(expanded(name)) and on_hub(name, revision):  # the first document alone, not all of it
            source = open_source(name, data.column, config, split, True, source.commit or revision)
        elif source.commit is not None:
            continue
        next(source.read(), None)


def corpora_for(
    model: Reader,
    data: DataConfig | Mapping[str, Any],
    *,
    training_tokens: int,
    evaluation_tokens: int,
    least_evaluation_tokens: int | None = None,
) -> Corpora:
    """Training and held-out sequences for a model: `load_corpora` with its tokenizer, context and vocabulary."""
    try:
        return load_corpora(
            data,
            tokenizer=model.tokenizer,
            model_context=model.context,
            vocab_size=model.vocab_size,
            training_tokens=training_tokens,
            evaluation_tokens=evaluation_tokens,
            least_evaluation_tokens=least_evaluation_tokens,
        )
    except NoTokenizer as error:
        raise NoTokenizer(f"{error} There is none because {model.no_tokenizer}") from None


def load_corpora(
    data: DataConfig | Mapping[str, Any],
    *,
    tokenizer: Any | None,
    model_context: int | None,
    vocab_size: int,
    training_tokens: int,
    evaluation_tokens: int,
    least_evaluation_tokens: int | None = None,
) -> Corpora:
    """Training and held-out sequences, which share no document.

    Where held-out text has no source of its own, it is the last `heldout_share` of the documents; of a streamed
    source (which is read only as far as needed) it is the documents whose hash falls into that share. Training
    documents identical to held-out ones are dropped and counted.

    Args:
        data: a recipe's section, or a mapping of its keys.
        tokenizer: a Hugging Face tokenizer; None for sources of token ids.
        model_context: most positions the model takes; None: it sets no bound.
        vocab_size: ids must be below this.
        training_tokens: positions to be trained on; whole sequences of them must be there, in `data.epochs` passes.
        evaluation_tokens: held-out positions that must be there; the most that will be evaluated on, so that a
            streamed held-out source is read, and compared with the training side, that far.
        least_evaluation_tokens: as many will do where no more are there; unset: all of them must be.

    Raises:
        DataError: a source is missing, empty, too short, of the wrong kind, or the two overlap wholly.
    """
    data = DataConfig.of(data)
    layout = _layout(data, tokenizer, model_context)
    encoding = _encoding(data, layout, tokenizer, vocab_size)
    wanted = max(1, training_tokens // layout.context)
    wanted_heldout = max(1, evaluation_tokens // layout.context)
    loader = _Loader(data, layout, encoding)
    asked, read = wanted, -1
    while True:
        corpora = loader.corpora(asked, wanted_heldout, limit=wanted if data.streaming else None)
        missing, before, read = wanted - len(corpora.train), read, corpora.dropped + len(corpora.train.documents)
        if not data.streaming or missing <= 0 or read == before:
            break
        asked += missing  # what identical text took from the training side is read on for
    least = evaluation_tokens if least_evaluation_tokens is None else min(least_evaluation_tokens, evaluation_tokens)
    _check_lengths(corpora, data, wanted, max(1, least // layout.context))
    return corpora


def _one_source(data: DataConfig) -> bool:
    return data.heldout is None and data.heldout_split is None and data.source != EMBEDDED


def _name(data: DataConfig, source: str) -> str:
    pinned = data.revision is not None and source == data.source
    return f"{source} at revision {data.revision}" if pinned else source


def _layout(data: DataConfig, tokenizer: Any | None, model_context: int | None) -> SequenceLayout:
    context = data.context or model_context
    if context is None:
        raise DataError("The model names no longest context. Set data.context, the tokens per sequence.")
    if model_context is not None and context > model_context:
        raise DataError(f"data.context is {context}, but the model takes at most {model_context} positions. Lower it.")
    bos = None
    if data.prepend_bos:
        if tokenizer is None:
            raise NoTokenizer("data.prepend_bos is set, but the model has no tokenizer to name the token.")
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise DataError("data.prepend_bos is set, but the tokenizer has no beginning-of-sequence token. Unset it.")
        if context < 2:
            raise DataError(f"data.context is {context}; with data.prepend_bos it must be at least 2.")
    left_out = tuple(sorted(_left_out(data, tokenizer).items()))
    separator, roles = _separator(data, tokenizer), tuple(sorted(set(data.leave_out_roles)))
    if roles and EMBEDDED in (data.source, data.heldout):
        raise no_roles("the embedded corpus")
    if data.document_attention and separator is None:
        raise DataError(
            "data.document_attention is set, but the tokenizer has no EOS, so that no token ends a document. Set "
            "data.separator."
        )
    settings = (data.mask_first_position, left_out, roles, data.document_attention)
    return SequenceLayout(context, data.packing, bos, separator, *settings)


def _left_out(data: DataConfig, tokenizer: Any | None) -> dict[int, int]:
    """Ids that do not count, each with how many positions after it do not either."""
    if tokenizer is None:
        for setting in ("leave_out_special", "leave_out_tokens"):
            if getattr(data, setting):
                raise NoTokenizer(f"data.{setting} is set, but the model has no tokenizer to name the tokens.")
        return {}
    special = special_ids(tokenizer) if data.leave_out_special else ()
    named = {_id_of(token, "data.leave_out_tokens", tokenizer): after for token, after in data.leave_out_tokens}
    return dict.fromkeys(special, 0) | named


def _id_of(token: str, setting: str, tokenizer: Any) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise DataError(
            f"{setting} is {token!r}, not a single token of the tokenizer's vocabulary. Write it as the tokenizer does."
        )
    return found


def _encoding(data: DataConfig, layout: SequenceLayout, tokenizer: Any | None, vocab_size: int) -> Encoding:
    encoding = Encoding(tokenizer, layout.separator, vocab_size, data.special_tokens, layout.roles)
    for setting, token in (("data.separator", layout.separator), ("data.prepend_bos", layout.bos)):
        if token is not None and token >= vocab_size:
            raise outside_vocabulary(f"The tokenizer (for {setting})", token, encoding)
    return encoding


def _separator(data: DataConfig, tokenizer: Any | None) -> int | None:
    if tokenizer is None:
        if data.separator is not None:
            raise NoTokenizer(f"data.separator is {data.separator!r}, but the model has no tokenizer to look it up in.")
        return EMBEDDED_EOS if EMBEDDED in (data.source, data.heldout) else None
    if data.separator is None:
        return tokenizer.eos_token_id
    return _id_of(data.separator, "data.separator", tokenizer)


class _Loader:
    """Opens the sources of a recipe."""

    def __init__(self, data: DataConfig, layout: SequenceLayout, encoding: Encoding) -> None:
        self._data, self._layout, self._encoding = data, layout, encoding
        self.commit: str | None = None
        source = _name(data, data.heldout or data.source)
        share = (
            f"{'documents drawn by hash' if data.streaming else 'the last documents'}, {data.heldout_share:g} of all"
        )
        self.heldout_name = f"{source}, {share}" if _one_source(data) else f"{source}, held out"

    def corpora(self, train: int, heldout: int, limit: int | None) -> Corpora:
        """Both sides, without what is identical.

        Args:
            train: sequences wanted, where the source is read only as far as needed; `heldout` alike.
            limit: training sequences that are kept at most.
        """
        read = self._split if _one_source(self._data) else self._separate
        trained, held = read(train, heldout)
        if not len(held):
            raise DataError(f"No document of {self.heldout_name} falls on the held-out side. Raise data.heldout_share.")
        duplicates = shared_with(trained, held)
        dropped, total = int(duplicates.sum()), len(trained)
        trained = trained.where(~duplicates)
        if not len(trained):
            raise DataError(
                f"All {total:,} training documents of {self._data.source} are also held out ({self.heldout_name}), so "
                "nothing is left to train on. Set data.heldout or data.heldout_split to other text, or leave both "
                "unset."
            )
        name = _name(self._data, self._data.source)
        return Corpora(
            Corpus(trained, self._layout, name, limit),
            Corpus(held, self._layout, self.heldout_name),
            dropped,
            self.commit,
        )

    def _split(self, train: int, heldout: int) -> tuple[Documents, Documents]:
        """One source, some of whose documents are held out."""
        share = self._data.heldout_share
        source = self._source(self._data.source, self._data.split, "train")
        self._check_column(source)
        documents = self._open(source, Quota(self._layout, train, heldout, share))
        if self._data.streaming:
            held = held_by_hash(documents.hashes, share)
        elif len(documents) < 2:
            raise DataError(
                f"{self._data.source} holds a single document, so none can be held out. "
                "Set data.heldout to other text; in a .txt file, blank lines separate documents."
            )
        else:
            held = np.arange(len(documents)) >= len(documents) - max(1, round(share * len(documents)))
        if held.all():
            raise DataError(
                f"data.heldout_share {share:g} of {self._data.source} leaves no document to train on. Lower it."
            )
        return documents.where(~held), documents.where(held)

    def _separate(self, train: int, heldout: int) -> tuple[Documents, Documents]:
        """Two sources, or two splits of one."""
        split = self._data.heldout_split or self._data.split
        held_source = self._source(self._data.heldout or self._data.source, split, "heldout")
        source = self._source(self._data.source, self._data.split, "train")
        self._check_column(held_source, source)
        held = self._open(held_source, Quota(self._layout, heldout))
        return self._open(source, Quota(self._layout, train, excluded=compared(held))), held

    def _source(self, name: str, split: str, side: str) -> TextSource | Documents:
        """Open the source of documents; the embedded corpus is there already, for a model of its vocabulary."""
        own = name == self._data.source
        config, revision = (self._data.dataset_config, self._data.revision) if own else (None, None)
        if name != EMBEDDED:
            revision = revision or (self.commit if own else None)  # the same, however often it is opened
            source = open_source(name, self._data.column, config, split, self._data.streaming, revision)
            self.commit = source.commit if own else self.commit
            return source
        refuse_hub_settings("the embedded corpus", config, revision)
        if split != DEFAULT_SPLIT:
            raise no_split("The embedded corpus", split, [DEFAULT_SPLIT])
        tokens, tokenizer = _embedded_tokens(side), self._encoding.tokenizer
        if tokenizer is not None and tokenizer.get_vocab() != _embedded_tokenizer().get_vocab():
            return _embedded_text(side, tokens)
        if (highest := int(tokens.max())) >= self._encoding.vocab_size:
            raise outside_vocabulary("The embedded corpus", highest, self._encoding)
        return _embedded_documents(side)

    def _check_column(self, *sources: TextSource | Documents) -> None:
        used = any(isinstance(source, TextSource) and source.has_columns for source in sources)
        if self._data.column is not None and not used:
            raise DataError(f"data.column is {self._data.column!r}, but {self._data.source} has no columns. Unset it.")

    def _open(self, source: TextSource | Documents, quota: Quota) -> Documents:
        if isinstance(source, Documents):
            return source
        layout, quota_or_none = self._layout, quota if self._data.streaming else None
        cache = cache_folder() if self._data.cache is None else expanded(str(self._data.cache))
        documents = open_store(source, self._encoding, layout.payload, cache, quota_or_none)
        if layout.packing == "document" and self._encoding.separator is None:
            raise DataError(
                f"data.packing is document, but {source.name} has no separator that ends a document. "
                "Set data.separator."
            )
        self._check_rows(source.name, documents)
        return documents

    def _check_rows(self, name: str, documents: Documents) -> None:
        """Refuse rows, packed before, that are too short to stay so, or begin with the BOS that is put before."""
        bos, packing = self._layout.bos, self._layout.packing
        if documents.inside is None or packing == "document":
            return
        if (longest := int((documents.ends - documents.starts).max())) < self._layout.payload:
            raise DataError(
                f"{name} holds rows of at most {longest} ids, fewer than the {self._layout.payload} of a sequence, and "
                "rows that were packed before are not joined. Lower data.context."
            )
        if bos is not None and (documents.tokens[documents.starts] == bos).all():
            raise DataError(
                f"Every row of {name} begins with the beginning-of-sequence token already, so data.prepend_bos would "
                "put a second one there. Unset it; data.mask_first_position leaves the first out of losses and metrics."
            )


def _embedded_tokens(side: str) -> NDArray[np.unsignedinteger]:
    from endwise import embedded

    return embedded.train_tokens() if side == "train" else embedded.heldout_tokens()


@cache
def _embedded_documents(side: str) -> Documents:
    """Found once in a process: a sweep or a study asks for them again and again."""
    return documents_in(_embedded_tokens(side), EMBEDDED_EOS)


@cache
def _embedded_tokenizer() -> Any:
    from tokenizers import Tokenizer

    with as_file(files("endwise.embedded") / "data" / "tokenizer.json") as path:
        return Tokenizer.from_file(str(path))


def _embedded_text(side: str, tokens: NDArray[np.unsignedinteger]) -> TextSource:
    """The embedded corpus as text, for a model with a tokenizer of its own."""

    def read() -> Iterator[Document]:
        tokenizer = _embedded_tokenizer()
        documents = np.split(tokens, np.flatnonzero(tokens == EMBEDDED_EOS) + 1)
        for start in range(0, len(documents), ROWS_AT_ONCE):
            ids = [document.tolist() for document in documents[start : start + ROWS_AT_ONCE] if len(document)]
            for text, own in zip(tokenizer.decode_batch(ids), ids, strict=True):
                yield Document(text, size=len(own))

    name = f"the embedded corpus ({side})"
    return TextSource(name, ["embedded", side, _digest(tokens)], read, len(tokens), has_columns=False)


def _digest(tokens: NDArray[np.unsignedinteger]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).hexdigest()


def _check_lengths(corpora: Corpora, data: DataConfig, wanted: int, wanted_heldout: int) -> None:
    train, heldout, context = corpora.train, corpora.heldout, corpora.train.context
    if len(train) * data.epochs < wanted:
        times = "" if data.epochs == 1 else f" x {data.epochs} epochs = {train.tokens * data.epochs:,}"
        enough = f"Set data.epochs to {-(-wanted // len(train))}, or lower" if len(train) else "Lower"
        raise DataError(
            f"{train.name} has {train.tokens:,} training tokens (whole sequences of {context}){times}, fewer than "
            f"the {wanted * context:,} asked for. "
            f"{enough} training.tokens, or give more text."
        )
    if len(heldout) < wanted_heldout:
        raise DataError(
            f"{heldout.name} has {heldout.tokens:,} held-out tokens (whole sequences of {context}), fewer than the "
            f"{wanted_heldout * context:,} asked for. "
            "Lower evaluation.tokens (or --tokens, where it is given), raise data.heldout_share, or set data.heldout."
        )
