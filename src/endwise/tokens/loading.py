"""From a recipe's `data` section to the two corpora of a run."""

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.errors import DataError, NoTokenizer
from endwise.language_model import LanguageModel
from endwise.reading import expanded, there_is
from endwise.run_config import DataConfig
from endwise.tokens.corpus import Corpora, Corpus, Documents, Layout, shared_with
from endwise.tokens.sources import ROWS_AT_ONCE, Document, Source, no_revision, open_source
from endwise.tokens.store import open_store
from endwise.tokens.tokenising import Encoding, Quota, documents_in, held_by_hash, outside_vocabulary

EMBEDDED = "embedded"
EMBEDDED_EOS = 0


def corpora_for(model: LanguageModel, data: DataConfig, *, training_tokens: int, evaluation_tokens: int) -> Corpora:
    """Training and held-out sequences for a model: `load_corpora` with its tokenizer, context and vocabulary."""
    try:
        return load_corpora(
            data,
            tokenizer=model.tokenizer,
            model_context=model.context,
            vocab_size=model.vocab_size,
            training_tokens=training_tokens,
            evaluation_tokens=evaluation_tokens,
        )
    except NoTokenizer as error:
        raise NoTokenizer(f"{error} There is none because {model.no_tokenizer}") from None


def load_corpora(
    data: DataConfig,
    *,
    tokenizer: Any | None,
    model_context: int | None,
    vocab_size: int,
    training_tokens: int,
    evaluation_tokens: int,
) -> Corpora:
    """Training and held-out sequences, which share no document.

    Where held-out text has no source of its own, it is the last `heldout_share` of the documents; of a streamed
    source (which is read only as far as needed) it is the documents whose hash falls into that share. Training
    documents identical to held-out ones are dropped and counted.

    Args:
        tokenizer: a Hugging Face tokenizer; None for sources of token ids.
        model_context: most positions the model takes; None: it sets no bound.
        vocab_size: ids must be below this.
        training_tokens: positions to be trained on; whole sequences of them must be there, in `data.epochs` passes.
        evaluation_tokens: held-out positions that must be there; the most that will be evaluated on, so that a
            streamed held-out source is read, and compared with the training side, that far.

    Raises:
        DataError: a source is missing, empty, too short, of the wrong kind, or the two overlap wholly.
    """
    layout, encoding = _layout(data, tokenizer, model_context), _encoding(data, tokenizer, vocab_size)
    wanted = max(1, training_tokens // layout.context)
    wanted_heldout = max(1, evaluation_tokens // layout.context)
    loader = _Loader(data, layout, encoding)
    if _one_source(data):
        train, heldout = loader.split(wanted, wanted_heldout)
    else:
        train, heldout = loader.separate(wanted, wanted_heldout)
    if not len(heldout):
        raise DataError(f"No document of {loader.heldout_name} falls to the held-out side. Raise data.heldout_share.")
    duplicates = shared_with(train, heldout)
    dropped, total = int(duplicates.sum()), len(train)
    train = train.where(~duplicates)
    if not len(train):
        raise DataError(
            f"All {total:,} training documents of {data.source} are also held out ({loader.heldout_name}), so nothing "
            "is left to train on. Set data.heldout or data.heldout_split to other text, or leave both unset."
        )
    limit = wanted if data.streaming else None
    corpora = Corpora(
        Corpus(train, layout, _name(data, data.source), limit), Corpus(heldout, layout, loader.heldout_name), dropped
    )
    _check_lengths(corpora, data, wanted, wanted_heldout)
    return corpora


def _one_source(data: DataConfig) -> bool:
    return data.heldout is None and data.heldout_split is None and data.source != EMBEDDED


def _name(data: DataConfig, source: str) -> str:
    pinned = data.revision is not None and source == data.source
    return f"{source} at revision {data.revision}" if pinned else source


def _layout(data: DataConfig, tokenizer: Any | None, model_context: int | None) -> Layout:
    context = data.context or model_context
    if context is None:
        raise DataError("The model names no longest context. Set data.context, the tokens per sequence.")
    if model_context is not None and context > model_context:
        raise DataError(f"data.context is {context}, but the model takes at most {model_context} positions. Lower it.")
    bos = None
    if data.prepend_bos:
        if tokenizer is None:
            raise NoTokenizer("data.prepend_bos is set, but the model has no tokenizer that would name the token.")
        bos = getattr(tokenizer, "bos_token_id", None)
        if bos is None:
            raise DataError("data.prepend_bos is set, but the tokenizer has no beginning-of-sequence token. Unset it.")
        if context < 2:
            raise DataError(f"data.context is {context}; with data.prepend_bos it must be at least 2.")
    return Layout(context, data.packing, bos, _separator(data, tokenizer), data.mask_first_position)


def _encoding(data: DataConfig, tokenizer: Any | None, vocab_size: int) -> Encoding:
    encoding = Encoding(tokenizer, _separator(data, tokenizer), vocab_size)
    for setting, token in (("data.separator", encoding.separator), ("data.prepend_bos", _bos(data, tokenizer))):
        if token is not None and token >= vocab_size:
            raise outside_vocabulary(f"The tokenizer (for {setting})", token, encoding)
    return encoding


def _bos(data: DataConfig, tokenizer: Any | None) -> int | None:
    return getattr(tokenizer, "bos_token_id", None) if data.prepend_bos else None


def _separator(data: DataConfig, tokenizer: Any | None) -> int | None:
    if tokenizer is None:
        if data.separator is not None:
            raise NoTokenizer(f"data.separator is {data.separator!r}, but the model has no tokenizer to look it up in.")
        return EMBEDDED_EOS if EMBEDDED in (data.source, data.heldout) else None
    if data.separator is None:
        return tokenizer.eos_token_id
    token = tokenizer.convert_tokens_to_ids(data.separator)
    if token is None or (token == tokenizer.unk_token_id and data.separator != tokenizer.unk_token):
        raise DataError(
            f"data.separator is {data.separator!r}, which is no single token of the tokenizer's vocabulary."
        )
    return token


class _Loader:
    """Opens the sources of a recipe."""

    def __init__(self, data: DataConfig, layout: Layout, encoding: Encoding) -> None:
        self._data, self._layout, self._encoding = data, layout, encoding
        source = _name(data, data.heldout or data.source)
        share = (
            f"{'documents drawn by hash' if data.streaming else 'the last documents'}, {data.heldout_share:g} of all"
        )
        self.heldout_name = f"{source}, {share}" if _one_source(data) else f"{source}, held out"

    def split(self, train: int, heldout: int) -> tuple[Documents, Documents]:
        """One source, some of whose documents are held out."""
        share = self._data.heldout_share
        documents = self._open(self._data.source, self._data.split, Quota(self._layout, train, heldout, share), "train")
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

    def separate(self, train: int, heldout: int) -> tuple[Documents, Documents]:
        """Two sources, or two splits of one."""
        source, split = self._data.heldout or self._data.source, self._data.heldout_split or self._data.split
        held = self._open(source, split, Quota(self._layout, heldout), "heldout")
        excluded = held.hashes[held.comparable]
        quota = Quota(self._layout, train, excluded=excluded)
        return self._open(self._data.source, self._data.split, quota, "train"), held

    def _open(self, name: str, split: str, quota: Quota, side: str) -> Documents:
        own = name == self._data.source
        revision = self._data.revision if own else None
        if name == EMBEDDED:
            if revision is not None:
                raise no_revision("the embedded corpus", revision)
            tokens = _embedded_tokens(side)
            if self._speaks_embedded():
                return self._checked_embedded(side, int(tokens.max()))
            source = _embedded_text(side, tokens)
        else:
            self._refuse_split_of_files(name)
            config = self._data.dataset_config if own else None
            source = open_source(name, self._data.column, config, split, self._data.streaming, revision)
        quota_or_none = quota if self._data.streaming else None
        documents = open_store(source, self._encoding, self._layout.context, self._cache(), quota_or_none)
        if self._layout.packing == "document" and self._encoding.separator is None:
            raise DataError(
                f"data.packing is document, but {name} has no separator that ends a document. Set data.separator."
            )
        return documents

    def _refuse_split_of_files(self, name: str) -> None:
        path = expanded(name)
        if self._data.heldout_split and there_is(path) and not (path / "dataset_dict.json").exists():
            raise DataError(
                f"data.heldout_split is {self._data.heldout_split!r}, but {name} has no splits. "
                "Set data.heldout to the held-out file instead, or unset data.heldout_split."
            )

    def _checked_embedded(self, side: str, highest: int) -> Documents:
        if highest >= self._encoding.vocab_size:
            raise outside_vocabulary("The embedded corpus", highest, self._encoding)
        return _embedded_documents(side)

    def _speaks_embedded(self) -> bool:
        tokenizer = self._encoding.tokenizer
        return tokenizer is None or tokenizer.get_vocab() == _embedded_tokenizer().get_vocab()

    def _cache(self) -> Path:
        folder = self._data.cache or os.environ.get("ENDWISE_CACHE") or "~/.cache/endwise"
        return expanded(str(folder))


def _embedded_tokens(side: str) -> NDArray[np.unsignedinteger]:
    from endwise import embedded

    return embedded.train_tokens() if side == "train" else embedded.heldout_tokens()


@cache
def _embedded_documents(side: str) -> Documents:
    """Found once in a process: a sweep or a study asks for them again and again."""
    return documents_in(_embedded_tokens(side), EMBEDDED_EOS)


def _embedded_tokenizer() -> Any:
    from tokenizers import Tokenizer

    with as_file(files("endwise.embedded") / "data" / "tokenizer.json") as path:
        return Tokenizer.from_file(str(path))


def _embedded_text(side: str, tokens: NDArray[np.unsignedinteger]) -> Source:
    """The embedded corpus as text, for a model with a tokenizer of its own."""

    def read() -> Iterator[Document]:
        tokenizer = _embedded_tokenizer()
        documents = np.split(tokens, np.flatnonzero(tokens == EMBEDDED_EOS) + 1)
        for start in range(0, len(documents), ROWS_AT_ONCE):
            ids = [document.tolist() for document in documents[start : start + ROWS_AT_ONCE] if len(document)]
            for text, own in zip(tokenizer.decode_batch(ids), ids, strict=True):
                yield Document(text, size=len(own))

    return Source(f"the embedded corpus ({side})", ["embedded", side, _digest(tokens)], read, len(tokens))


def _digest(tokens: NDArray[np.unsignedinteger]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16).hexdigest()


def _check_lengths(corpora: Corpora, data: DataConfig, wanted: int, wanted_heldout: int) -> None:
    train, heldout, context = corpora.train, corpora.heldout, corpora.train.context
    if len(train) * data.epochs < wanted:
        enough = f"Set data.epochs to {-(-wanted // len(train))}, or lower" if len(train) else "Lower"
        raise DataError(
            f"{train.name} has {train.tokens:,} training tokens (whole sequences of {context}) x {data.epochs} epochs "
            f"= {train.tokens * data.epochs:,}, fewer than the {wanted * context:,} asked for. "
            f"{enough} training.tokens, or give more text."
        )
    if len(heldout) < wanted_heldout:
        raise DataError(
            f"{heldout.name} has {heldout.tokens:,} held-out tokens (whole sequences of {context}), fewer than the "
            f"{wanted_heldout * context:,} asked for. "
            "Lower evaluation.tokens, raise data.heldout_share, or set data.heldout."
        )
