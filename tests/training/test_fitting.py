"""Fits to activations: what the members of a group share is recorded once, and each ends as it would alone."""

import pytest
import torch

from endwise import train, train_together
from endwise.config.run import RunConfig
from endwise.dictionaries import SAE
from endwise.models.language_model import LanguageModel
from endwise.training import fitting
from small_gpt2 import recipe


def config(out, k, **changes):
    """A run with a scale that is fitted before training and a threshold that is fitted after it."""
    values = recipe(out, "local", tokens=320).model_dump(mode="json", exclude_unset=True)
    values["dictionary"] |= {"architecture": "batchtopk", "k": k, "normalize": "scalar"}
    values["objective"] = {"kind": "local", "balance": "loss"}
    return RunConfig.build(values | changes)


@pytest.fixture
def passes(monkeypatch):
    """Clean passes of each fit, in the order in which members ask."""
    counted, plain = [], {name: getattr(fitting, name) for name in ("fit_first", "fit_last")}
    clean, running = LanguageModel.clean, []

    def counting(self, *arguments, **named):
        if running:
            counted[-1][1] += 1
        return clean(self, *arguments, **named)

    def watched(name):
        def fit(text, member):
            counted.append([name, 0])
            running.append(name)
            try:
                plain[name](text, member)
            finally:
                running.pop()

        return fit

    monkeypatch.setattr(LanguageModel, "clean", counting)
    monkeypatch.setattr("endwise.training.setup.fit_first", watched("fit_first"))
    monkeypatch.setattr("endwise.training.loop.fit_last", watched("fit_last"))
    return counted


def test_a_group_records_once_what_each_is_fitted_to(model, corpora, tmp_path, passes):
    together = train_together(
        [config(tmp_path / f"k{k}", k) for k in (2, 3, 4)], model=model, corpora=corpora, display=False
    )
    assert [name for name, _ in passes] == ["fit_first"] * 3 + ["fit_last"] * 3
    first, last = ([count for name, count in passes if name == of] for of in ("fit_first", "fit_last"))
    assert first[0] > 0 and last[0] > 0 and first[1:] == last[1:] == [0, 0]
    for run in together:
        alone = train(
            config(tmp_path / "alone" / run.folder.name, run.config.dictionary.k), model=model, corpora=corpora
        )
        ours, expected = SAE.load(run.folder).state_dict(), SAE.load(alone.folder).state_dict()
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


def test_what_is_met_at_another_place_is_recorded_for_it(model, corpora, tmp_path, passes):
    configs = [config(tmp_path / "a", 2), config(tmp_path / "b", 2, site="blocks.1.hook_resid_post")]
    train_together(configs, model=model, corpora=corpora, display=False)
    assert all(count > 0 for _, count in passes)
