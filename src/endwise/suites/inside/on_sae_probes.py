"""sae-probes on a run, in an environment of its own: `python on_sae_probes.py JOB.json`. What is done is kept."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

from opening import BenchJob, done
from sae_probes import DATASETS, run_sae_evals  # type: ignore[pyrefly:missing-import]
from sae_probes.generate_model_activations import ensure_dataset_activations  # type: ignore[pyrefly:missing-import]

LONGEST = 1024
"""Tokens of a text that sae-probes reads."""


def main(job: BenchJob) -> None:
    given, model, device = job.settings, job.open_model(), job.device
    tasks = list(given["datasets"] or DATASETS)
    if unknown := set(tasks) - set(DATASETS):
        sys.exit(f"sae-probes has no task {', '.join(sorted(unknown))}; it has {', '.join(DATASETS)}")
    # By itself it would open the model by name, and read more tokens than a model of short context takes.
    longest = min(LONGEST, model.cfg.n_ctx)
    where = {"model_cache_path": "cache", "device": device, "max_seq_len": longest, "model": model}
    ensure_dataset_activations(job.name_of_model, tasks, [job.site], **where)
    del model, where["model"]
    run_sae_evals(
        job.open_sae(),
        model_name=job.name_of_model,
        hook_name=job.site,
        reg_type=given["regularisation"],
        setting=given["setting"],
        ks=list(given["k"]),
        binarize=given["binarize"],
        results_path="results",
        model_cache_path="cache",
        datasets=tasks,
        device=device,
        seed=given["seed"],
    )
    found: dict[str, list[float]] = defaultdict(list)
    for file in Path("results").rglob("*.json"):
        for record in json.loads(file.read_text()):
            for name in ("test_auc", "test_acc", "test_f1"):
                found[f"top_{record['k']}_{name}"].append(record[name])
    done({"tasks": len(tasks), **{name: mean(values) for name, values in found.items()}})


if __name__ == "__main__":
    main(BenchJob.given())
