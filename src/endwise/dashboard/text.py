"""Readings of a text that someone types: what fires there, and what the model predicts, clean and reconstructed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from endwise.common.errors import ConfigError
from endwise.common.text import printable
from endwise.config.run import DataConfig
from endwise.dashboard.scripts import short
from endwise.dictionaries import SAE
from endwise.features.harvest.top_tokens import written, written_text
from endwise.features.intervening import Intervention
from endwise.features.steering import Sampling, steer, typed_tokens
from endwise.models.language_model import LanguageModel
from endwise.models.sites import Place, Site
from endwise.models.splicing import SplicedPass

MOST_TOKENS = 512
MOST_NEW = 64
"""Tokens by which a text is continued."""
PER_TOKEN = 20
"""Features of a token that are listed, the most active first."""
OVER_TEXT = 60
"""Features of the whole text that are listed, by their greatest activation."""
PREDICTED = 6
"""Tokens of a prediction that are listed, the likeliest first."""


@dataclass(frozen=True)
class TextReader:
    """A model with one run's SAE at its place."""

    model: LanguageModel
    sae: SAE
    place: Place | Site
    data: DataConfig
    """Settings by which sequences begin, as in training: with BOS or not, and whether position 0 counts."""

    @property
    def most_tokens(self) -> int:
        return min(MOST_TOKENS, (self.model.context or MOST_TOKENS) - self.data.prepend_bos)

    @torch.no_grad()
    def read(self, text: str) -> dict[str, Any]:
        """Token by token, as JSON that `text.js` shows; lists have one entry per token.

        A position that was masked in training (BOS; on request position 0, or one of outlying norm) keeps its own
        activation in the spliced pass, and no feature is listed for it, as in every metric.

        Raises:
            ConfigError: the text has no token or too many, or the model has no tokenizer.
        """
        tokens, mask = typed_tokens(self.model, text, self.data, self.most_tokens + self.data.prepend_bos)
        place = Place.of(self.place)
        clean = self.model.clean(tokens, record=place.sites, final=True)
        read = clean.activations[place.reads].float()
        mask = self.sae.within_limit(read, mask)
        latents = self.sae.encode(read)
        spliced = SplicedPass(self.model, place.writes).run(clean, self.sae.reconstruct(latents, read), mask).final
        assert clean.final is not None and spliced is not None
        compared = self.model.readout.compare(clean.final, [spliced], tokens, mask)[0]
        active = latents.dense()[0].where(mask[0, :, None], 0.0)
        both = torch.stack([compared.ce_clean[0], compared.ce_spliced[0]], 1).tolist()
        ce = [short(pair) if known else None for known, pair in zip(compared.predicts[0].tolist(), both, strict=True)]
        return {
            "tokens": list(map(printable, written_text(self.model, tokens[0].tolist()))),
            "counts": mask[0].tolist(),
            "active": [_strongest(row, PER_TOKEN) for row in active],
            "l0": (active != 0).sum(1).tolist(),
            "over_text": _over_text(active),
            "clean": self._predictions(clean.final[0]),
            "spliced": self._predictions(spliced[0]),
            "ce": ce,
            "kl": short(compared.kl[0].tolist()),
        }

    def steer(self, text: str, edit: Intervention, tokens: int) -> dict[str, Any]:
        """Continue a text with and without a feature edited, as JSON that `steer.js` shows.

        Raises:
            ConfigError: see `steer`; or more tokens are asked for than `MOST_NEW`.
        """
        if not 1 <= tokens <= MOST_NEW:
            raise ConfigError(f'"tokens" is a number from 1 to {MOST_NEW}; given {tokens}.')
        sampling = Sampling(tokens)
        made = steer(self.model, {self.place: self.sae}, [edit], text, data=self.data, sampling=sampling)
        shown = {name: list(map(printable, getattr(made, name))) for name in ("prompt", "clean", "steered")}
        inside = None if made.kl_in_prompt is None else short([made.kl_in_prompt])[0]
        return {**shown, "kl": short([made.kl])[0], "kl_in_prompt": inside}

    def _predictions(self, final: Float[Tensor, "pos d_model"]) -> list[list[list[Any]]]:
        probabilities = self.model.readout.logits(final).softmax(-1)
        best = probabilities.topk(min(PREDICTED, probabilities.shape[-1]), dim=-1)
        texts = [[printable(written(self.model, token)) for token in row] for row in best.indices.tolist()]
        return [
            [[text, share] for text, share in zip(row, short(shares), strict=True)]
            for row, shares in zip(texts, best.values.tolist(), strict=True)
        ]


def _strongest(row: Float[Tensor, " d_sae"], most: int) -> list[list[float | int | None]]:
    """The features that are not 0 with their values, the greatest first."""
    found = row.topk(min(most, len(row)))
    kept = [(f, v) for f, v in zip(found.indices.tolist(), found.values.tolist(), strict=True) if v > 0]
    return [[feature, *short([value])] for feature, value in kept]


def _over_text(active: Float[Tensor, "pos d_sae"]) -> list[dict[str, Any]]:
    greatest = active.amax(0)
    features: Int64[Tensor, " n"] = greatest.topk(min(OVER_TEXT, len(greatest))).indices
    kept: Sequence[int] = [feature for feature in features.tolist() if greatest[feature] > 0]
    return [{"feature": feature, "values": short(active[:, feature].tolist())} for feature in kept]
