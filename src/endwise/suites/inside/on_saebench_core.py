"""SAEBench's core evaluation of a run, in an environment of its own: `python on_saebench_core.py JOB.json`."""

from pathlib import Path

from datasets import Dataset
from opening import BenchJob, done
from sae_bench.evals.core import main as core  # type: ignore[pyrefly:missing-import]
from sae_bench.evals.core.eval_config import CoreEvalConfig  # type: ignore[pyrefly:missing-import]
from sae_bench.sae_bench_utils import general_utils, get_eval_uuid  # type: ignore[pyrefly:missing-import]
from sae_lens import ActivationsStore  # type: ignore[pyrefly:missing-import]

KEPT = (
    "ce_loss_score", "ce_loss_without_sae", "ce_loss_with_sae", "ce_loss_with_ablation", "kl_div_score",
    "kl_div_with_sae", "l0", "explained_variance", "explained_variance_legacy", "mse", "cossim", "frac_alive",
)  # fmt: skip
MEASURED = (
    "kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics",
    "featurewise_weight_based_metrics",
)  # fmt: skip


def main(job: BenchJob) -> None:
    given, model = job.settings, job.open_model()
    _, sae, _ = general_utils.load_and_format_sae(job.name, job.open_sae(), job.device)
    config = CoreEvalConfig(
        model_name=job.name_of_model,
        batch_size_prompts=given["batch"],
        n_eval_reconstruction_batches=given["reconstruction_batches"],
        n_eval_sparsity_variance_batches=given["variance_batches"],
        dataset=job.heldout or job.local or given["dataset"],
        context_size=given["context"],
        exclude_special_tokens_from_reconstruction=given["spare_special_tokens"],
        verbose=True,
        **{f"compute_{what}": True for what in MEASURED},
    )
    # Tokens are handed over: of a data set's name SAELens would ask the hub by which tokenizer they were made.
    text = Dataset.from_parquet(job.heldout) if job.heldout else config.dataset
    store = ActivationsStore.from_sae(model, sae, dataset=text, context_size=given["context"], device=job.device)
    if job.heldout is None:
        store.shuffle_input_dataset(seed=42)
    special = {model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    found, features = core.run_evals(sae, store, model, config, ignore_tokens=special - {None}, verbose=True)
    found["misc_metrics"] = core.calculate_misc_metrics(features)
    Path("results").mkdir(exist_ok=True)
    result = {"eval_cfg": config, "metrics": found, "feature_metrics": features, "sae_set": job.name, "sae_id": "sae"}
    core.save_single_eval_result(
        core.replace_nans_with_negative_one(result),
        get_eval_uuid(),
        core.get_sae_lens_version(),
        core.get_sae_bench_version(),
        f"results/{job.name}_eval_results.json",
        sae,
    )
    flat = {name: value for group in found.values() for name, value in group.items()}
    done({name: flat[name] for name in KEPT if name in flat})


if __name__ == "__main__":
    main(BenchJob.given())
