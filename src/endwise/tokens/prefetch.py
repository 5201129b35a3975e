"""Batches read ahead of the step that needs them, by a thread."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from endwise.tokens.corpus import Corpus, TokenBatch

AHEAD = 2


@contextmanager
def read_ahead(
    corpus: Corpus, order: Iterable[Sequence[int]], device: torch.device, ahead: int = AHEAD
) -> Iterator[Iterator[TokenBatch]]:
    """The batches of `order`, each the indices of its sequences, one after another on `device`.

    A thread cuts up to `ahead` of them out of the corpus before they are asked for. For a GPU it puts them into pinned
    memory, and the copy to the device is issued when a batch is asked for, by the thread that asks: it joins that
    thread's stream, so that nothing need wait for it, and its memory is that stream's.

    An error in `order` or the corpus is raised, as it is, where its batch would have come. The thread has ended when
    the context ends, whatever ended it.
    """
    left = iter(order)

    def read() -> TokenBatch | None:
        if (indices := next(left, None)) is None:
            return None
        batch = corpus.batch(indices)
        return batch.pinned() if device.type == "cuda" else batch

    def batches() -> Iterator[TokenBatch]:
        while (batch := ready.popleft().result()) is not None:
            ready.append(pool.submit(read))
            yield batch.to(device)

    pool = ThreadPoolExecutor(1, thread_name_prefix="endwise-read-ahead")
    try:
        ready = deque(pool.submit(read) for _ in range(ahead))
        yield batches()
    finally:
        pool.shutdown(cancel_futures=True)
