"""Conversations become ids by the model's chat template, and each token is marked with whose it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endwise.common.errors import DataError, NoTokenizer

TEMPLATE = "template"
"""Name of the tokens that are in no message's content."""
_STAND_IN = "\ue000"
"""Written in a message's place to see where the template puts it; a private character, which text does not hold."""
_MARKS = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True)
class Chat:
    """A conversation as a data set has it: messages with a `role` and a `content`, and what else a template reads."""

    messages: Sequence[dict[str, Any]]
    where: str = field(compare=False)

    @classmethod
    def of(cls, value: Any, where: str) -> "Chat":
        """Check a row of a column of conversations.

        Raises:
            DataError: a message has no role, or content that is no text.
        """
        messages = [{key: each for key, each in message.items() if each is not None} for message in value]
        for number, message in enumerate(messages, 1):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content", ""), str):
                raise DataError(
                    f"{where}: message {number} must have a role and a content that are text, such as "
                    f"{{'role': 'user', 'content': 'Hello'}}, not {message!r:.80}. Rename its keys, or set data.column."
                )
        return cls(messages, where)

    def __len__(self) -> int:
        """Characters of its contents."""
        return sum(len(message.get("content", "")) for message in self.messages)


@dataclass(frozen=True)
class ChatEncoding:
    """Turns conversations into ids.

    Args:
        left_out: roles whose tokens do not count, and `TEMPLATE` for those that are in no content.
    """

    tokenizer: Any
    left_out: tuple[str, ...] = ()

    @cached_property
    def template(self) -> str:
        """
        Raises:
            NoTokenizer, DataError: the model has no tokenizer, or that has no chat template.
        """
        if self.tokenizer is None:
            raise NoTokenizer("The source holds conversations, but the model has no tokenizer. Give token ids instead.")
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "The source holds conversations, but the model's tokenizer has no chat template to write them with. "
                "Choose a model that was trained on chats, or give a column of text (data.column)."
            )
        return str(self.tokenizer.get_chat_template())

    def encoded(self, chat: Chat) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Ids of a conversation, and which of them do not count.

        A token is of the message in whose content any of its characters lies. Where the template marks what the
        assistant generates, those tokens are the assistant's, and no others.

        Raises:
            NoTokenizer, DataError: see `template`; the template refuses the conversation, or writes a content otherwise
                than it is.
        """
        text = self._written(chat, chat.messages)
        offsets = bool(self.left_out)
        if offsets and not self.tokenizer.is_fast:
            raise DataError(
                "data.leave_out_roles is set, but the model's tokenizer does not say where in a text its tokens stand "
                "(it is not a fast one). Unset it, and name tokens in data.leave_out_tokens."
            )
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found = self.tokenizer(text, return_offsets_mapping=offsets, **options)
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        if not offsets:
            return ids, np.zeros(len(ids), bool)
        begin, end = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        left, content = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
        marked = self._marked(chat, ids)
        for number, message in enumerate(chat.messages):
            if message["role"] == "assistant" and marked is not None:
                continue
            first, last = self._place(chat, number, text)
            inside = (begin < last) & (end > first)
            content |= inside
            if message["role"] in self.left_out:
                left |= inside
        if marked is not None:
            content |= marked
            left = (left & ~marked) | (marked if "assistant" in self.left_out else False)
        return ids, left | (~content if TEMPLATE in self.left_out else False)

    def _written(self, chat: Chat, messages: Sequence[dict[str, Any]]) -> str:
        template = self.template
        try:
            return self.tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
        except Exception as error:  # noqa: BLE001  A template is a program, and raises whatever it likes.
            reason = " ".join(str(error).split())
            raise DataError(f"{chat.where}: the chat template does not take the conversation: {reason:.200}") from None

    def _place(self, chat: Chat, number: int, text: str) -> tuple[int, int]:
        """Find where a message's content stands in the text: it is what changes if another stands in its place."""
        message = chat.messages[number]
        content = message.get("content", "")
        if not content:
            return 0, 0
        others = [*chat.messages[:number], {**message, "content": _STAND_IN}, *chat.messages[number + 1 :]]
        other = self._written(chat, others)
        if other == text:  # the template leaves the message out
            return 0, 0
        first = _common(text, other)
        last = len(text) - _common(text[first:][::-1], other[first:][::-1])
        if text[first:last].strip() not in content:
            raise DataError(
                f"{chat.where}: the chat template changes the content of message {number + 1} ({message['role']}), "
                "so that its tokens cannot be found. Unset data.leave_out_roles, and name tokens "
                "in data.leave_out_tokens."
            )
        return first, last

    def _marked(self, chat: Chat, ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Find the tokens that the template marks as generated; None: it marks none."""
        if not _MARKS.search(self.template):
            return None
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self.tokenizer.apply_chat_template(list(chat.messages), chat_template=self.template, **options)
        if found["input_ids"] != ids.tolist():
            raise DataError(f"{chat.where}: the tokenizer encodes the conversation differently from its text.")
        return np.asarray(found["assistant_masks"], dtype=bool)


def _common(one: str, other: str) -> int:
    """Count the characters that two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def no_roles(name: str) -> DataError:
    return DataError(
        f"data.leave_out_roles is set, but {name} holds no conversations, whose messages have roles. Unset it, or set "
        "data.column to a column of messages."
    )


def spans(left: NDArray[np.bool_], start: int) -> NDArray[np.int64]:
    """Find where runs of True begin and end, `[runs, 2]`, the first entry standing at `start`."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], left, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2) + start
