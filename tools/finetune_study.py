"""Finetune SAEs that SAELens has trained to their end, against SAELens training on for as many tokens.

In an environment that holds `sae-lens` (and no endwise), train them on the embedded model, which lies in the package:

    python tools/finetune_study.py train FOLDER --seeds 0 1 2 --architectures standard topk

leaves of each seed `at80` (after 80 % of the tokens), `at100`, and two that trained on for a further tenth: `on` at the
rate that training ended with, `again` at the rate that training began with, which falls to 0. Then, with endwise:

    python tools/finetune_study.py tune FOLDER

tunes each `at100` on as many tokens, measures all on the same held-out text, and writes `FOLDER/table.md`.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).parents[1] / "src" / "endwise" / "embedded" / "data"
LAYER, FEATURES, TOKENS, SHARE = 3, 512, 4_000_000, 0.1
CONTEXT, SEQUENCES, BATCH = 256, 64, 2048
SETTINGS = {
    "standard": {"l1_coefficient": 10.0},
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "jumprelu": {"l0_coefficient": 1.0},
    "matryoshka_batchtopk": {"k": 16, "matryoshka_widths": [64, 256, FEATURES]},
}
RATES = dict.fromkeys(SETTINGS, 3e-3)


def train(folder: Path, seeds: list[int], architectures: list[str], tokens: int) -> None:
    """Train with SAELens what is not there yet."""
    for architecture in architectures:
        for seed in seeds:
            at = folder / f"{architecture}-{seed}"
            if not (at / "again" / "sae_weights.safetensors").exists():
                _train(at, architecture, seed, tokens)


def _train(at: Path, architecture: str, seed: int, tokens: int) -> None:
    import sae_lens
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    names = {name: f"{name.title().replace('_', '')}" for name in SETTINGS}
    names |= {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}
    names |= {"matryoshka_batchtopk": "MatryoshkaBatchTopK"}
    stem = names[architecture]
    metadata = SAEMetadata(model_name="embedded", hook_name=f"blocks.{LAYER}.hook_resid_pre", context_size=CONTEXT)
    width = json.loads((DATA / "config.json").read_text())["n_embd"]
    config = getattr(sae_lens, f"{stem}TrainingSAEConfig")(
        d_in=width, d_sae=FEATURES, normalize_activations="none", metadata=metadata, **SETTINGS[architecture]
    )
    sae = getattr(sae_lens, f"{stem}TrainingSAE")(config)
    batches, rate = _activations(seed), RATES[architecture]

    def fit(sae, samples: int, rate: float, end: float, schedule: str, saved: dict[int, Path]):
        def provider() -> Iterator:
            for number, batch in enumerate(batches):
                if (number * BATCH) in saved:
                    sae.save_inference_model(str(saved[number * BATCH]))
                yield batch

        about = SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=BATCH,
            lr=rate,
            lr_end=end,
            lr_scheduler_name=schedule,
            lr_decay_steps=0 if end else samples // BATCH,
            logger=LoggingConfig(log_to_wandb=False),
            n_batches_for_norm_estimate=1,
        )
        return SAETrainer(cfg=about, sae=sae, data_provider=provider()).fit()

    at80 = BATCH * round(0.8 * tokens / BATCH)
    sae = fit(sae, tokens, rate, rate / 10, "cosineannealing", {at80: at / "at80"})
    sae.save_inference_model(str(at / "at100"))
    for name, (start, end) in {"on": (rate / 10, rate / 10), "again": (rate, 0.0)}.items():
        more = fit(copy.deepcopy(sae), round(SHARE * tokens), start, end, "constant", {})
        more.save_inference_model(str(at / name))


def _activations(seed: int) -> Iterator:
    """Batches of the residual stream, in an order that the seed draws anew for every epoch."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA).eval()
    tokens = np.load(DATA / "train_tokens.npy", mmap_mode="r")
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    drawn, held = np.random.default_rng(seed), []
    model.transformer.h[LAYER].register_forward_pre_hook(lambda _, args: held.append(args[0]))
    del model.transformer.h[LAYER + 1 :]
    left = torch.zeros(0)
    while True:
        order = drawn.permutation(len(rows))
        for start in range(0, len(order), SEQUENCES):
            ids = torch.from_numpy(rows[np.sort(order[start : start + SEQUENCES])].astype(np.int64))
            with torch.no_grad():
                model.transformer(ids, use_cache=False)
            found = held.pop().flatten(0, 1)
            found = found[torch.from_numpy(drawn.permutation(len(found)))]
            left = found if not len(left) else torch.cat([left, found])
            while len(left) >= BATCH:
                yield left[:BATCH]
                left = left[BATCH:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--architectures", nargs="+", default=["standard", "topk"], choices=SETTINGS)
    training.add_argument("--tokens", type=int, default=TOKENS)
    given = vars(parser.parse_args())
    {"train": train}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
