"""Tokenises text: `python tokenise.py SOURCE HELDOUT CACHE SLOWLY`. Prints what came of it as JSON."""

import json
import sys
import time
from pathlib import Path

import endwise.tokens.tokenising as tokenising
from endwise.common.errors import EndwiseError
from endwise.config.run import DataConfig
from endwise.tokens import load_corpora


class Words:
    """A tokenizer of fixed words, that counts its texts."""

    eos_token_id, bos_token_id, unk_token_id, unk_token = 0, None, 1, "?"
    texts = 0
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def __init__(self, slowly: bool) -> None:
        self.slowly = slowly

    def get_vocab(self):
        return {"end": 0, "?": 1}

    def convert_ids_to_tokens(self, number):
        return {0: "end", 1: "?"}.get(number)

    def __call__(self, texts, **_options):
        self.texts += len(texts)
        time.sleep(0.02 * self.slowly)
        return {"input_ids": [[2 + sum(map(ord, word)) % 90 for word in text.split()] for text in texts]}


if __name__ == "__main__":
    source, heldout, cache, slowly = sys.argv[1:]
    tokenising.PAUSES = (0.1, 0.1)
    tokenizer = Words(slowly == "1")
    settings = DataConfig(source=source, heldout=heldout, context=8, cache=Path(cache))
    try:
        corpora = load_corpora(
            settings,
            tokenizer=tokenizer,
            model_context=8,
            vocab_size=100,
            training_tokens=8,
            evaluation_tokens=8,
        )
    except EndwiseError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"texts": tokenizer.texts, **corpora.describe()}))
