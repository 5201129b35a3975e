"""Run folders of dictionaries that were never trained, so that how they lie is known."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from endwise.common.files import write_json
from endwise.common.tensor_files import write_tensors
from endwise.config.run import RunConfig
from endwise.dictionaries import ReluSAE
from endwise.evaluation.evaluate import FIRINGS_FILE, SUMS_FILE
from small_gpt2 import SITE

WIDTH = 16
TOKENS = 256


def directions(count, seed=0, width=WIDTH):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def near(rows, noise, seed=0):
    """The same directions in another order, each turned a little; and where each has gone, `[rows]`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)
    turned = rows + noise * normalize(torch.randn(rows.shape, generator=generator), dim=1)
    return normalize(turned[order], dim=1), order.argsort().numpy()


def write_run(
    folder: Path,
    rows,
    *,
    kind="local",
    coefficient=1.0,
    seed=0,
    firings=None,
    ce_increase=0.2,
    tokens=TOKENS,
    site=SITE,
    learning_rate=1e-3,
):
    """A run folder as `endwise train` and `endwise evaluate` leave it, without checkpoints."""
    firings = np.full(len(rows), 5) if firings is None else np.asarray(firings)
    objective = {"kind": kind, "sparsity": {"coefficient": coefficient}}
    recipe = {
        "site": site,
        "dictionary": {"size": len(rows)},
        "objective": objective | ({"downstream_mse": 2.0} if kind == "e2e_ds" else {}),
        "training": {"tokens": 640, "batch": 4, "learning_rate": learning_rate},
        "seed": seed,
        "out": folder,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(RunConfig.build(recipe).to_yaml())
    width = rows.shape[1]
    tensors = {"W_enc": rows.T, "b_enc": torch.zeros(len(rows)), "W_dec": rows, "b_dec": torch.zeros(width)}
    sizes = {"d_in": width, "d_sae": len(rows)}
    ReluSAE.from_tensors(tensors, {**sizes, "apply_b_dec_to_input": False}).save(folder / "sae")
    write_tensors(folder / FIRINGS_FILE, {"firings": torch.from_numpy(firings.astype(np.int64))}, {})
    write_tensors(folder / SUMS_FILE, {"tokens": torch.full((4,), tokens / 4, dtype=torch.float64)}, {})
    measured = {"l0": 5.0 + coefficient, "alive": int((firings > 0).sum()), "alive_tokens": tokens, "d_sae": len(rows)}
    measured |= {"ce_increase": ce_increase, "kl": ce_increase, "explained_variance": {"per_token": 0.5}}
    write_json(folder / "evaluation.json", {**measured, "downstream_mse": {}, "intervals": {}})
    return folder
