"""Measures the embedded model and writes its card: `python tools/embedded_model/card.py`, after `build.py`.

Every measurement on the card is taken here, from the files that ship; nothing is carried over from training but its
settings.
"""

import json
import re
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from build import EOS, HELDOUT_SHARE, TARGET, VOCAB, WHEEL
from corpus import LINKING_WORDS
from kneser_ney import Floats, KneserNey
from train_lm import BATCH, CONTEXT, PHASES, WARMUP
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from endwise.common.statistics import bootstrap_ratio

ORDERS = {1: "unigram", 2: "bigram", 3: "trigram", 4: "4-gram", 5: "5-gram"}
REQUIRED_MARGIN = 0.10
SIZE_LIMIT = 16_000_000
CHECK_WINDOWS = 80
"""The loss over the first windows is stated too, so that a test can repeat it in a second."""
SHARED_RUN = 32
SAMPLES, PROMPT, NEW_TOKENS = 8, 16, 48
RESAMPLES = 2000

HELLASWAG_LICENCE = """\
MIT License

Copyright (c) 2019 Rowan Zellers

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


@dataclass(frozen=True)
class Shipped:
    """Files that `build.py` made, as they ship."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    train: np.ndarray
    heldout: np.ndarray


@dataclass(frozen=True)
class Losses:
    """Nats of the held-out predictions, summed within each window: `[windows]` for the model and each n-gram order."""

    predictions: int
    """In each window."""
    model: Floats
    ngrams: dict[int, Floats]

    def mean(self, sums: Floats) -> float:
        return float(sums.sum() / (len(sums) * self.predictions))

    def margin(self, order: int) -> tuple[float, float, float]:
        """Share by which the model's loss lies below an n-gram model's, with both ends of its interval."""
        ratio = bootstrap_ratio(self.model, self.ngrams[order], RESAMPLES, seed=0)
        return 1 - ratio.estimate, 1 - ratio.high, 1 - ratio.low


def load() -> Shipped:
    model = GPT2LMHeadModel.from_pretrained(TARGET)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TARGET)
    train, heldout = (np.load(TARGET / f"{side}_tokens.npy", allow_pickle=False) for side in ("train", "heldout"))
    return Shipped(model.eval(), tokenizer, train, heldout)


def windows(stream: np.ndarray, start: int = 0) -> np.ndarray:
    """The stream's whole windows from `start` on."""
    return stream[start : start + (len(stream) - start) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


@torch.no_grad()
def model_nats(model: GPT2LMHeadModel, rows: np.ndarray) -> Floats:
    """The loss of every prediction, `[windows, CONTEXT - 1]`: of each window's tokens, all but the first."""
    nats = []
    for tokens in torch.from_numpy(rows.astype(np.int64)).split(BATCH):
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        nats.append(loss.view(len(tokens), -1).double())
    return torch.cat(nats).numpy()


def measure(shipped: Shipped) -> tuple[Losses, Losses]:
    """Over whole windows; and over the second halves of windows that start every half window, so that the model sees
    at least `CONTEXT / 2` tokens before each. The n-gram models always see their full context.
    """
    ngrams = {order: -np.log(KneserNey(shipped.train, order, VOCAB).stream(shipped.heldout)) for order in ORDERS}
    half = CONTEXT // 2
    rows = [windows(shipped.heldout), windows(shipped.heldout, half)]
    model = [model_nats(shipped.model, each) for each in rows]
    whole = Losses(CONTEXT - 1, model[0].sum(1), {order: windows(nats)[:, 1:].sum(1) for order, nats in ngrams.items()})
    late = Losses(
        half,
        np.concatenate([each[:, half - 1 :].sum(1) for each in model]),
        {
            order: np.concatenate([windows(nats, start)[:, half:].sum(1) for start in (0, half)])
            for order, nats in ngrams.items()
        },
    )
    return whole, late


@torch.no_grad()
def continuation(model: GPT2LMHeadModel, prompt: np.ndarray, seed: int) -> list[int]:
    """Tokens drawn from the model's own distribution, up to EOS or `NEW_TOKENS`."""
    generator = torch.Generator().manual_seed(seed)
    tokens, drawn = torch.from_numpy(prompt.astype(np.int64))[None], []
    while len(drawn) < NEW_TOKENS and (not drawn or drawn[-1]):
        shares = model(tokens, use_cache=False).logits[0, -1].softmax(-1)
        drawn.append(int(torch.multinomial(shares, 1, generator=generator)))
        tokens = torch.cat([tokens, torch.tensor([[drawn[-1]]])], dim=1)
    return drawn


def documents(tokens: np.ndarray) -> list[np.ndarray]:
    """Each document without its EOS."""
    ends = np.flatnonzero(tokens == 0)
    return [tokens[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def runs(tokens: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit fingerprint of every run of so many tokens (equal runs, equal fingerprints)."""
    mixed = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    for first in range(length):
        mixed = (mixed ^ tokens[first : first + len(mixed)]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def documents_sharing_runs(train: np.ndarray, heldout: np.ndarray) -> int:
    """Held-out documents in which a run of `SHARED_RUN` tokens starts that training has too."""
    starts = np.flatnonzero(np.isin(runs(heldout, SHARED_RUN), runs(train, SHARED_RUN)))
    document = np.cumsum(heldout == 0) - (heldout == 0)
    return len(np.unique(document[starts]))


def reflow(text: str) -> str:
    """Paragraphs filled to the width of a line, code spans unbroken; headings, tables, lists and code as they are."""
    kept = ("#", "|", "-", "`" * 3, "    ")
    wrapper = textwrap.TextWrapper(width=119, break_on_hyphens=False, break_long_words=False)

    def filled(block: str) -> str:
        return wrapper.fill(re.sub("`.+?`", lambda span: span[0].replace(" ", "\0"), block)).replace("\0", " ")

    return "\n\n".join(block if block.startswith(kept) else filled(block) for block in text.split("\n\n"))


def data_section(shipped: Shipped) -> str:
    train, heldout = shipped.train, shipped.heldout
    sharing, of = documents_sharing_runs(train, heldout), int((heldout == 0).sum())
    return f"""\
## Data

**Source.** The passages of HellaSwag (Zellers, Holtzman, Bisk, Farhadi & Choi, 2019, *HellaSwag: Can a Machine Really
Finish Your Sentence?*, ACL; <https://rowanzellers.com/hellaswag>): the contexts of its training and validation parts,
each with its true ending, as the Python package `{WHEEL}` carries them. The false, machine-written endings are not
used. HellaSwag took the passages from wikiHow articles and from the captions of ActivityNet Captions (Krishna et al.,
2017).

**Licence.** HellaSwag is published under the MIT licence at the end of this card. That is its authors' licence for
their data set: wikiHow, at that time, offered its readers' articles under CC BY-NC-SA 3.0, which asks for attribution
and excludes commercial use. Whoever redistributes the token streams commercially should settle that for themselves.

**Cleaning.** HellaSwag's markup (`[title]`, `[step]`, …) is removed, runs of white space become one space, spaces
before punctuation go, and equal pieces are kept once. Pieces that share a sentence of at least {LINKING_WORDS} words,
or an article's title, belong to one group; a group becomes one document, in which a sentence that an earlier piece
said is left out.

**Split.** By group, so that pieces joined by such a sentence or title never stand on both sides: a group is held out
if a hash of its first piece falls into the lowest {HELDOUT_SHARE:.0%} of the range. Documents are shuffled (seed 0),
each followed by `{EOS}`.

| | documents | tokens |
|---|---:|---:|
| training | {int((train == 0).sum()):,} | {len(train):,} |
| held out | {of:,} | {len(heldout):,} |

No held-out document equals a training document. Near copies remain: {sharing} of the {of:,} held-out documents
({sharing / of:.2%}) share a run of {SHARED_RUN} tokens with training, for example formulaic captions and scraps of web
pages.

**Tokenizer.** Byte-level BPE of {VOCAB:,} tokens, trained on the training documents only; any text can be encoded and
decoded again. `{EOS}` (id 0) ends a document and serves as BOS; nothing is put before a text."""


def model_section(shipped: Shipped) -> str:
    config, tokens = shipped.model.config, sum(phase.tokens for phase in PHASES)
    parameters = sum(parameter.numel() for parameter in shipped.model.parameters())
    first, second = PHASES
    return f"""\
## Model and training

GPT-2's architecture (`GPT2LMHeadModel`): {config.n_layer} layers, `d_model` {config.n_embd}, {config.n_head} heads,
context {config.n_positions}, tied embedding and unembedding, no dropout; {parameters:,} parameters in float32.

Trained from scratch on {tokens:,} tokens ({tokens / len(shipped.train):.1f} passes over the training stream, cut at
another offset in every pass), {BATCH} windows of {CONTEXT} tokens a step, which run across the ends of documents, in
two phases. First {first.steps:,} steps of AdamW (learning rate 0.003, β 0.9 and 0.95, weight decay 0.1 on matrices);
then {second.steps:,} steps of Muon (0.01, momentum 0.95, weight decay 0.05) for the blocks' matrices and AdamW (0.001)
for the rest. In each, the rate rises over {WARMUP} steps, stays, and falls linearly to zero over the last
{first.decay_share:.0%} and {second.decay_share:.0%}; the gradient's norm is clipped at 1. Seeds 0 and 1, on a
processor, in float32. To make it all again:

```sh
python tools/embedded_model/build.py
python tools/embedded_model/card.py
```

The second command measures what this card says and writes it."""


def loss_section(losses: Losses, late: Losses, first: float) -> str:
    means = {order: losses.mean(sums) for order, sums in losses.ngrams.items()}
    top, best = max(means), min(means, key=lambda order: means[order])
    margin, low, high = losses.margin(top)
    late_margin, late_low, late_high = late.margin(top)
    verdict = "meets" if margin >= REQUIRED_MARGIN else "misses"
    rows = "\n".join(f"| {ORDERS[order]}, modified Kneser-Ney | {mean:.4f} |" for order, mean in means.items())
    count, mean = len(losses.model), losses.mean(losses.model)
    return f"""\
## Held-out loss

Cross-entropy of the next token in nats, over all {count:,} whole windows of {CONTEXT} held-out tokens
({count * (CONTEXT - 1):,} predictions; a window's first token is not predicted).

| model | nats per token |
|---|---:|
| uniform, log {VOCAB:,} | {np.log(VOCAB):.4f} |
{rows}
| **this model** | **{mean:.4f}** |

The model's loss is **{margin:.2%}** below the {ORDERS[top]}'s (95 % bootstrap interval over windows: {low:.2%} to
{high:.2%}), which {verdict} the bar of {REQUIRED_MARGIN:.0%} set for it. The best of these n-gram orders is the
{ORDERS[best]}.

That charges the model for the starts of windows, where it has seen next to nothing, while an n-gram model has its full
context from the stream. With windows that start every {CONTEXT // 2} tokens and only their second halves counted, so
that at least {CONTEXT // 2} tokens stand before each prediction, the model's loss is {late.mean(late.model):.4f} and
the {ORDERS[top]}'s {late.mean(late.ngrams[top]):.4f}: {late_margin:.2%} below ({late_low:.2%} to {late_high:.2%}).

On the first {CHECK_WINDOWS * CONTEXT:,} held-out tokens ({CHECK_WINDOWS} windows) alone the model's loss is
**{first:.4f}**.

The n-gram models (`tools/embedded_model/kneser_ney.py`) are interpolated modified Kneser-Ney down to the uniform
distribution, with discounts estimated from counts of counts (Chen & Goodman, 1998; none is tuned), trained on the same
training stream. They predict the same tokens. Both see across the ends of documents."""


def shown(label: str, text: str) -> str:
    """Lines of an indented code block: quoted, control characters escaped, so that nothing acts as Markdown."""
    quoted = json.dumps(text, ensure_ascii=False)
    printable = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
    first, rest = f"    {label:<14}", " " * 18
    return textwrap.fill(printable, 110, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def sample(shipped: Shipped, prompt: np.ndarray, seed: int) -> str:
    drawn = continuation(shipped.model, prompt, seed)
    before, after = (str(shipped.tokenizer.decode(tokens)) for tokens in (prompt, drawn))
    return f"Seed {seed}:\n\n{shown('prompt', before)}\n{shown('continuation', after)}"


def samples_section(shipped: Shipped) -> str:
    prompts = [document[:PROMPT] for document in documents(shipped.heldout)[:SAMPLES]]
    body = "\n\n".join(sample(shipped, prompt, seed) for seed, prompt in enumerate(prompts))
    return f"""\
## Samples

Not selected: the first {PROMPT} tokens of the first {SAMPLES} held-out documents, in order, each continued once by
{NEW_TOKENS} tokens (or up to `{EOS}`, the end of the document) at temperature 1 from the model's whole distribution,
seeds 0 to {SAMPLES - 1}. A line break within a text is shown as `\\n`.

{body}"""


def use_section() -> str:
    return """\
## Use and limits

Made so that `endwise`'s examples, tests, recipes and benchmarks run offline on an ordinary processor, and so that
sparse autoencoders can be trained on a real, if small, language model in minutes. What is found on it says how a
method behaves at this scale; it need not hold for larger models.

- It writes something like English about everyday activities, with words that do not exist, and loses the thread
  within a sentence. Do not use it to generate text for anyone, to answer questions, or to judge people or advice.
- Two registers only: how-to articles and captions of videos. English only; other text costs many tokens and is
  predicted badly.
- It was trained on most of HellaSwag's training **and validation** passages with their true endings. Its score on
  HellaSwag, and that of anything trained on these streams, means nothing.
- Neither text nor model was filtered for content: stereotypes, errors and bad advice of the sources may come back.
- Held-out text comes from the same sources as the training text; the losses here say nothing about other text."""


FILES = {
    "config.json": "the architecture, as `transformers` reads it",
    "generation_config.json": "`transformers`' defaults for generation",
    "model.safetensors": "the weights, float32",
    "tokenizer.json": "the BPE vocabulary and merges",
    "tokenizer_config.json": "special tokens and context length",
    "train_tokens.npy": "the training stream, `uint16[tokens]`, each document followed by EOS",
    "heldout_tokens.npy": "the held-out stream, likewise",
}


def files_section() -> str:
    sizes = {name: (TARGET / name).stat().st_size for name in FILES}
    rows = "\n".join(f"| `{name}` | {sizes[name]:,} | {what} |" for name, what in FILES.items())
    return f"""\
## Files

| file | bytes | what it is |
|---|---:|---|
{rows}

Together {sum(sizes.values()):,} bytes; with this card they stay within {SIZE_LIMIT:,}."""


def licence_section() -> str:
    return f"## Licence of HellaSwag\n\n```text\n{HELLASWAG_LICENCE}\n```\n"


def main() -> None:
    shipped = load()
    whole, late = measure(shipped)
    losses = loss_section(whole, late, whole.mean(whole.model[:CHECK_WINDOWS]))
    head = """\
# The embedded language model and corpus

A small GPT-2 and two streams of tokens that ship inside `endwise`, so that everything runs without a network:
`endwise.load_model()` and the data source `embedded`. Every figure below is printed into this card by
`python tools/embedded_model/card.py`; change that, not this."""
    sections = [data_section(shipped), model_section(shipped), losses, samples_section(shipped)]
    card = "\n\n".join([*map(reflow, [head, *sections, use_section(), files_section()]), licence_section()])
    (TARGET / "README.md").write_text(card, encoding="utf-8")
    total = sum(file.stat().st_size for file in TARGET.iterdir())
    print(f"{reflow(losses)}\n\n{total:,} bytes in all")
    if total > SIZE_LIMIT:
        raise SystemExit(f"The folder may hold {SIZE_LIMIT:,} bytes.")


if __name__ == "__main__":
    main()
