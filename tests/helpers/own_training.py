"""Objects handed to training, or to what measures, in place of endwise's own: each does something besides.

A trainee acts at a step, a model around its clean pass, a corpus around its batches.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

from endwise import Corpora, LanguageModel
from endwise.tokens import Corpus
from endwise.training.setup import TrainingRequest
from endwise.training.train import trained
from endwise.training.trainee import Trainee


@dataclass(frozen=True)
class Act:
    """Something done before a method of trainees (`begin_step`, `accumulate`, `finish_step`), at one step.

    Args:
        site: of whose trainee; None: of all.
    """

    method: str
    step: int
    do: Callable[[Trainee], object]
    site: str | None = None


def stopping(step, number=signal.SIGINT):
    """Ctrl-C, or another signal, in the midst of a step; once, of however many trainees."""
    pressed = []

    def press(_trainee):
        if not pressed:
            pressed.append(number)
            os.kill(os.getpid(), number)

    return Act("finish_step", step, press)


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


def acting(*acts):
    class Acting(Trainee):
        def _before(self, method):
            for act in acts:
                if (act.method, act.step) == (method, self.step) and act.site in (None, self.site.name):
                    act.do(self)

        def begin_step(self):
            self._before("begin_step")
            super().begin_step()

        def accumulate(self, *given):
            self._before("accumulate")
            super().accumulate(*given)

        def finish_step(self, *given):
            self._before("finish_step")
            super().finish_step(*given)

    return Acting


def train_with(trainee, configs, model=None, corpora=None, display=False, **request):
    """Trains recipes as `train_together` does, with trainees of a class of one's own."""
    return trained(TrainingRequest(configs, display=display, trainee=trainee, **request), model, corpora)


class OwnModel(LanguageModel):
    """A model whose clean pass is `act(clean, tokens, record=, final=)`, where `clean` is that of `like`."""

    _act = None
    """Until the model has been tried."""

    def __init__(self, like, act):
        super().__init__(like.model, like.tokenizer)
        self._act = act

    def clean(self, tokens, record=(), final=False):
        if self._act is None:
            return super().clean(tokens, record, final)
        return self._act(super().clean, tokens, record=record, final=final)


class OwnCorpus(Corpus):
    """A corpus whose batch is `act(batch, indices)`, where `batch` is that of `like`."""

    def __init__(self, like, act):
        vars(self).update(vars(like))
        self._act = act

    def batch(self, indices):
        return self._act(super().batch, indices)


def with_batches(corpora: Corpora, act, side="train") -> Corpora:
    return replace(corpora, **{side: OwnCorpus(getattr(corpora, side), act)})


def reading(corpora: Corpora, before, side="train") -> Corpora:
    """The corpora, with something done before each batch of a side is read."""

    def act(batch, indices):
        before(indices)
        return batch(indices)

    return with_batches(corpora, act, side)
