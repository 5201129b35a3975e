"""YAML as recipes use it: plain values under words, no key twice, no aliases that unfold without end."""

import copy
from functools import lru_cache
from typing import Any

import yaml

LARGEST = 10_000
"""Values in a document, each alias counted as the whole of what it stands for."""
DEEPEST = 32
"""Levels of nesting."""
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""LibYAML's, eight times as fast, where PyYAML was built with it."""


def parse_yaml(text: str) -> Any:
    """One document's values.

    Raises:
        ValueError: it breaks a rule of YAML or of ours; one line that says which, and where.
    """
    return copy.deepcopy(_parsed(text))


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """Build the values; a run folder's recipe is read by every part that needs a field of it."""
    try:
        _check_depth(text)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _Measure().measure(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except Exception as error:  # PyYAML's own, and what int(), float() and date() say of a value with an explicit tag
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _check_depth(text: str) -> None:
    """Count levels event by event: LibYAML's composer calls itself for each, until the stack ends."""
    depth = 0
    for event in yaml.parse(text, _LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")


class _Measure:
    """Walks the nodes of a document before anything is built from them, each once however often it is referred to."""

    def __init__(self) -> None:
        self._known: dict[yaml.Node, tuple[int, int]] = {}
        self._open: set[yaml.Node] = set()

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Values below a node and levels of nesting, aliases unfolded.

        Raises:
            ValueError: it holds itself, is too large or too deep, or has a key twice.
        """
        if node in self._known:
            return self._known[node]
        if node in self._open:
            raise ValueError(f"an alias refers to a section that contains it{_place(node)}")
        self._open.add(node)
        inner = [self.measure(child) for child in _children(node)]
        self._open.remove(node)
        size, depth = 1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        if size > LARGEST:
            raise ValueError(f"it holds more than {LARGEST:,} values, aliases unfolded{_place(node)}")
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels{_place(node)}")
        self._known[node] = size, depth
        return size, depth


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEYS:
            raise ValueError(f"a key must be a word; quote it{_place(key)}")
        if key.value in seen:
            raise ValueError(f"the key {key.value!r:.80} is there twice; keep one{_place(key)}")
        seen.add(key.value)
    return [child for pair in node.value for child in pair]


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
