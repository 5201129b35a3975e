"""Batches read ahead of the step that needs them, by a thread."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from endwise.tokens.corpus import Corpus, TokenBatch

AHEAD = 2


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


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
    pinned = device.type == "cuda"
    ready: SimpleQueue[TokenBatch | _Failed | None] = SimpleQueue()
    room = threading.Semaphore(ahead)
    closed = threading.Event()

    def read() -> None:
        try:
            for indices in order:
                room.acquire()
                if closed.is_set():
                    return
                batch = corpus.batch(indices)
                ready.put(batch.pinned() if pinned else batch)
            ready.put(None)
        except BaseException as error:  # noqa: BLE001  It is raised again by whoever waits for the batch.
            ready.put(_Failed(error))

    def batches() -> Iterator[TokenBatch]:
        while (batch := ready.get()) is not None:
            if isinstance(batch, _Failed):
                raise batch.error
            room.release()
            yield batch.to(device)

    reader = threading.Thread(target=read, name="endwise-read-ahead", daemon=True)
    reader.start()
    try:
        yield batches()
    finally:
        closed.set()
        room.release()
        reader.join()
