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
from typing import Any

DATA = Path(__file__).parents[1] / "src" / "endwise" / "embedded" / "data"
LAYER, FEATURES, TOKENS, SHARE = 3, 512, 4_000_000, 0.1
CONTEXT, SEQUENCES, BATCH, SMALL_BATCH = 256, 64, 2048, 256
SETTINGS = {
    "standard": {"l1_coefficient": 10.0},
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "jumprelu": {"l0_coefficient": 1.0},
    "matryoshka_batchtopk": {"k": 16, "matryoshka_widths": [64, 256, FEATURES]},
}
RATES = dict.fromkeys(SETTINGS, 3e-3)
CLASSES = {
    "standard": "Standard",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "matryoshka_batchtopk": "MatryoshkaBatchTopK",
}
"""SAELens's names of its classes."""
SMALL, SMALL_SETTINGS = 24, {"standard": {"l1_coefficient": 2.0}, "jumprelu": {"l0_coefficient": 30.0}}
"""Features of those that tests tune."""


def train(folder: Path, seeds: list[int], architectures: list[str], tokens: int) -> None:
    """Train with SAELens what is not there yet."""
    for architecture in architectures:
        for seed in seeds:
            at = folder / f"{architecture}-{seed}"
            if not (at / "again" / "sae_weights.safetensors").exists():
                batches, rate = _activations(seed), RATES[architecture]
                sae = _saelens(architecture, seed, FEATURES)
                at80 = {BATCH * round(0.8 * tokens / BATCH): at / "at80"}
                sae = _fit(sae, batches, tokens, rate, rate / 10, "cosineannealing", at80)
                sae.save_inference_model(str(at / "at100"))
                for name, (start, end) in {"on": (rate / 10, rate / 10), "again": (rate, 0.0)}.items():
                    more = _fit(copy.deepcopy(sae), batches, round(SHARE * tokens), start, end, "constant", {})
                    more.save_inference_model(str(at / name))


def _saelens(architecture: str, seed: int, features: int) -> Any:
    """An SAE of SAELens's, to be trained."""
    import sae_lens  # type: ignore[pyrefly:missing-import]
    import torch
    from sae_lens.saes.sae import SAEMetadata  # type: ignore[pyrefly:missing-import]

    torch.manual_seed(seed)
    metadata = SAEMetadata(model_name="embedded", hook_name=f"blocks.{LAYER}.hook_resid_pre", context_size=CONTEXT)
    of_small = SMALL_SETTINGS.get(architecture, {}) if features == SMALL else {}
    settings = {**SETTINGS[architecture], **of_small, "d_sae": features, "d_in": _width(), "metadata": metadata}
    if "matryoshka_widths" in settings:
        settings["matryoshka_widths"] = [features // 8, features // 2, features]
    if "k" in settings:
        settings["k"] = min(settings["k"], features // 6)
    config = getattr(sae_lens, f"{CLASSES[architecture]}TrainingSAEConfig")(**settings)
    return getattr(sae_lens, f"{CLASSES[architecture]}TrainingSAE")(config)


def _fit(
    sae: Any,
    batches: Iterator,
    samples: int,
    rate: float,
    end: float,
    schedule: str,
    saved: dict[int, Path],
    size: int = BATCH,
) -> Any:
    """Train with SAELens's trainer on batches of `size` tokens, and save the SAE where so many are seen."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # type: ignore[pyrefly:missing-import]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[pyrefly:missing-import]

    def provider() -> Iterator:
        for number, batch in enumerate(batches):
            if number * size in saved:
                sae.save_inference_model(str(saved[number * size]))
            yield batch

    about = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=size,
        lr=rate,
        lr_end=end,
        lr_scheduler_name=schedule,
        lr_decay_steps=0 if end else samples // size,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=1,
    )
    return SAETrainer(cfg=about, sae=sae, data_provider=provider()).fit()


def small(folder: Path, tokens: int) -> None:
    """Train small SAEs with each package that can be imported, which tests tune (tests/fixtures/trained)."""
    from importlib.util import find_spec

    if find_spec("sae_lens"):
        for architecture in SETTINGS:
            sae, batches = _saelens(architecture, 0, SMALL), _activations(0, SMALL_BATCH)
            sae = _fit(sae, batches, tokens, 3e-3, 3e-4, "cosineannealing", {}, SMALL_BATCH)
            sae.save_inference_model(str(folder / f"sae_lens_{architecture}"))
    if find_spec("dictionary_learning"):
        _dictionary_learning(folder / "dictionary_learning_topk", tokens)
    if find_spec("sparsify"):
        _sparsify(folder / "sparsify_topk", tokens)


def tune(folder: Path, tokens: int, measured_on: int) -> None:
    """Tune every `at100` on a tenth of its tokens, and compare all on the same held-out text: `table.md`, a row an
    SAE, and `ratios.csv`, CE increase over that of `at100` with an interval over seeds.
    """
    import numpy as np

    import endwise
    from endwise.common.statistics import interval_over_seeds
    from endwise.common.tables import write_table
    from endwise.finetuning import TuningSettings, finetune

    model, shares = endwise.load_model("embedded"), {}
    lines = ["| SAE | CE increase | L0 | explained variance | of at100's CE increase |", "|---|---|---|---|---|"]
    for at in sorted(folder.glob("*-*")):
        settings = TuningSettings(tokens=round(SHARE * tokens), measured_on=measured_on)
        tuned = finetune(at / "at100", model=model, settings=settings, out=at / "tuned", say=print)
        saes = {name: endwise.SAE.load(at / name) for name in ("at80", "at100", "on", "again")} | {"tuned": tuned.sae}
        place, trained = model.place(tuned.config.place), tuned.config.training.tokens
        data, evaluation = tuned.config.data, tuned.config.evaluation
        heldout = endwise.corpora_for(model, data, training_tokens=trained, evaluation_tokens=measured_on).heldout
        found = endwise.measure(model, {name: (place, sae) for name, sae in saes.items()}, heldout, evaluation)
        for name, each in found.items():
            share = each["ce_increase"] / found["at100"]["ce_increase"]
            shares.setdefault((at.name.rpartition("-")[0], name), []).append(share)
            lines.append(
                f"| {at.name} {name} | {each['ce_increase']:.4f} | {each['l0']:.2f} | "
                f"{each['explained_variance.pooled']:.4f} | {share:.1%} |"
            )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    rows = []
    for (architecture, name), values in shares.items():
        interval = interval_over_seeds(np.array(values)) if len(values) > 1 else None
        ends = {} if interval is None else {"ratio": interval.estimate, "low": interval.low, "high": interval.high}
        rows.append(
            {
                "architecture": architecture,
                "sae": name,
                "ratio": sum(values) / len(values),
                **ends,
                "seeds": len(values),
            }
        )
    write_table(rows, folder / "ratios")
    print("\n".join(lines), *rows, sep="\n")


def _dictionary_learning(at: Path, tokens: int) -> None:
    import torch
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # type: ignore[pyrefly:missing-import]

    steps = tokens // SMALL_BATCH
    trainer = TopKTrainer(
        steps=steps, activation_dim=_width(), dict_size=SMALL, k=SMALL // 6, layer=LAYER, lm_name="embedded",
        dict_class=AutoEncoderTopK, lr=3e-3, warmup_steps=10, decay_start=steps // 2, seed=0, device="cpu",
    )  # fmt: skip
    for step, batch in zip(range(steps), _activations(0, SMALL_BATCH), strict=False):
        trainer.update(step, batch)
    at.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.ae.state_dict(), at / "ae.pt")
    (at / "config.json").write_text(json.dumps({"trainer": trainer.config}, indent=2))


def _sparsify(at: Path, tokens: int) -> None:
    import torch
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[pyrefly:missing-import]

    torch.manual_seed(0)
    coder = SparseCoder(_width(), SparseCoderConfig(num_latents=SMALL, k=SMALL // 6))
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    for step, batch in zip(range(tokens // SMALL_BATCH), _activations(0, SMALL_BATCH), strict=False):
        if step == 0:
            coder.b_dec.data = batch.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        optimizer.zero_grad()
        coder(batch).fvu.backward()
        optimizer.step()
    coder.set_decoder_norm_to_unit_norm()
    coder.save_to_disk(at)


def _width() -> int:
    return json.loads((DATA / "config.json").read_text())["n_embd"]


def _activations(seed: int, size: int = BATCH) -> Iterator:
    """Batches of `size` tokens of the residual stream, in an order that the seed draws for every epoch."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(DATA).eval()
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
            while len(left) >= size:
                yield left[:size]
                left = left[size:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    training = commands.add_parser("train")
    training.add_argument("folder", type=Path)
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--architectures", nargs="+", default=["standard", "topk"], choices=SETTINGS)
    training.add_argument("--tokens", type=int, default=TOKENS)
    tuning = commands.add_parser("tune")
    tuning.add_argument("folder", type=Path)
    tuning.add_argument("--tokens", type=int, default=TOKENS, help="that SAELens trained on")
    tuning.add_argument("--measured-on", type=int, default=200_000)
    fixtures = commands.add_parser("small")
    fixtures.add_argument("folder", type=Path)
    fixtures.add_argument("--tokens", type=int, default=400_000)
    given = vars(parser.parse_args())
    {"train": train, "tune": tune, "small": small}[given.pop("command")](**given)


if __name__ == "__main__":
    main()
