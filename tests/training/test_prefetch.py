"""Reading ahead: the same batches in the same order, errors as they are, and no thread left behind."""

import threading
import time

import pytest
import torch

from endwise import train
from endwise.common.errors import DataError, TrainingStopped
from endwise.runs.folder import RunFolder
from endwise.tokens import BatchOrder, Corpus, TokenBatch, read_ahead
from own_training import Act, OwnModel, acting, reading, train_with, with_batches
from small_gpt2 import recipe, small_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


class Pages(Corpus):
    """Stands for a corpus: notes what is read, waits where it is asked to, fails where it is asked to."""

    def __init__(self, fails_at=None, error=None):
        self.read, self.fails_at, self.error = [], fails_at, error
        self.gate = threading.Event()
        self.gate.set()

    def batch(self, indices):
        self.gate.wait()
        if indices[0] == self.fails_at:
            raise self.error
        self.read.append(indices[0])
        return TokenBatch(torch.full((1, 2), indices[0]), torch.ones(1, 2, dtype=torch.bool))


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("first", [0, 9])
def test_the_same_batches_in_the_same_order(corpora, first):
    order = BatchOrder(corpora.train, batch=40, seed=3, epochs=2)  # batch 12 spans two epochs
    numbers = range(first, len(order))
    with read_ahead(corpora.train, map(order.__getitem__, numbers), CPU) as batches:
        found = list(batches)
    assert len(found) == len(numbers) == 25 - first
    for number, batch in zip(numbers, found, strict=True):
        expected = corpora.train.batch(order[number])
        assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.mask, expected.mask)


def test_two_are_read_before_they_are_asked_for_and_no_more():
    pages = Pages()
    with read_ahead(pages, ([n] for n in range(10)), CPU) as batches:
        until(lambda: pages.read == [0, 1])
        time.sleep(0.05)
        assert pages.read == [0, 1]
        assert int(next(batches).tokens[0, 0]) == 0
        until(lambda: pages.read == [0, 1, 2])
        time.sleep(0.05)
        assert pages.read == [0, 1, 2]


@pytest.mark.parametrize("error", [DataError("the file was cut off"), OSError(5, "Input/output error")])
def test_an_error_comes_where_its_batch_would_have(error):
    with read_ahead(Pages(fails_at=3, error=error), ([n] for n in range(10)), CPU) as batches:
        assert [int(next(batches).tokens[0, 0]) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error)) as raised:
            next(batches)
    assert raised.value is error


def test_an_error_in_the_order_is_raised_too(corpora):
    order = BatchOrder(corpora.train, batch=4, seed=0)
    numbers = range(len(order) - 1, len(order) + 1)
    with read_ahead(corpora.train, map(order.__getitem__, numbers), CPU) as batches:
        next(batches)
        with pytest.raises(IndexError, match=f"Batch {len(order)} of {len(order)}"):
            next(batches)


@pytest.mark.parametrize("taken", [0, 1, 10])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_its_context_whatever_ends_that(taken, error):
    def use():
        with read_ahead(Pages(), ([n] for n in range(10)), CPU) as batches:
            for _ in range(taken):
                next(batches)
            if error is not None:
                raise error

    before = threading.active_count()
    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert threading.active_count() == before


def test_a_thread_in_the_middle_of_reading_ends_after_that_batch():
    pages = Pages()
    pages.gate.clear()
    with read_ahead(pages, ([n] for n in range(10)), CPU):
        threading.Timer(0.1, pages.gate.set).start()
    assert pages.read == [0]


def test_nothing_to_read():
    with read_ahead(Pages(), iter(()), CPU) as batches:
        assert list(batches) == []


def test_training_leaves_no_thread_and_tells_of_a_corpus_gone_bad(corpora, tmp_path):
    """The fixture looks for threads after each of these."""
    model, read = small_model(), []
    train(recipe(tmp_path / "whole", "local"), model=model, corpora=corpora, display=False)

    def fails_at_last(indices):
        if len(read) == 6:
            raise DataError("the file was cut off.")
        read.append(indices)

    bad = reading(corpora, fails_at_last)
    with pytest.raises(TrainingStopped, match=r"the file was cut off\. The last good state is saved in .*bad"):
        train(recipe(tmp_path / "bad", "local"), model=model, corpora=bad, display=False)
    assert RunFolder(tmp_path / "bad").latest_checkpoint().name == "step-000000006.safetensors"


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_training_that_is_broken_off_leaves_no_thread(corpora, tmp_path, error):
    calls = []

    def breaks(clean, tokens, **named):
        calls.append(tokens)
        if len(calls) == 3:
            raise error
        return clean(tokens, **named)

    with pytest.raises(error):
        train(recipe(tmp_path / "run", "local"), model=OwnModel(small_model(), breaks), corpora=corpora, display=False)


def test_the_next_batches_are_read_while_a_step_runs(corpora, tmp_path):
    read, waited = [], []

    def waits(trainee):
        until(lambda: len(read) == min(20, trainee.step + 3))  # this step's, and two more
        waited.append(trainee.step)

    waiting = acting(*(Act("finish_step", step, waits) for step in range(20)))
    train_with(waiting, [recipe(tmp_path / "run", "local")], small_model(), reading(corpora, read.append))
    assert waited == [*range(20)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_come_from_pinned_memory(corpora):
    pinned = []

    class Noting(TokenBatch):
        def to(self, device):
            pinned.append(self.tokens.is_pinned())
            return super().to(device)

    noting = with_batches(corpora, lambda batch, indices: Noting(*vars(batch(indices)).values()))
    order = BatchOrder(corpora.train, batch=4, seed=0)
    cuda = torch.device("cuda", torch.cuda.current_device())
    with read_ahead(noting.train, map(order.__getitem__, range(50)), cuda) as batches:
        for number, batch in enumerate(batches):
            assert batch.tokens.device == batch.mask.device == cuda
            assert torch.equal(batch.tokens.cpu(), corpora.train.batch(order[number]).tokens)
    assert pinned == [True] * 50
