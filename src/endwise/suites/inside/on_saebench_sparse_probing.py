"""SAEBench's sparse probing of a run, in an environment of its own: `python on_saebench_sparse_probing.py JOB.json`."""

import json
from pathlib import Path

import pandas as pd  # pyright: ignore[reportMissingImports]
from opening import BenchJob, done
from sae_bench.evals.sparse_probing import main as probing  # type: ignore[pyrefly:missing-import]
from sae_bench.evals.sparse_probing.eval_config import (  # type: ignore[pyrefly:missing-import]
    SparseProbingEvalConfig,
)
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, general_utils  # type: ignore[pyrefly:missing-import]


def main(job: BenchJob) -> None:
    given, model = job.settings, job.open_model()
    if job.local:
        add_local(Path(job.local), given["data_sets"])
    _, sae, _ = general_utils.load_and_format_sae(job.name, job.open_sae(), job.device)
    config = SparseProbingEvalConfig(
        model_name=job.name_of_model,
        dataset_names=list(given["data_sets"]),
        random_seed=given["seed"],
        probe_train_set_size=given["train"],
        probe_test_set_size=given["test"],
        context_length=given["context"],
        k_values=list(given["k"]),
        llm_batch_size=given["batch"],
        llm_dtype="float32",
    )
    found, classes = probing.run_eval_single_sae(config, sae, model, job.device, "cache", save_activations=False)
    Path("results").mkdir(exist_ok=True)
    record = {"settings": given, "results": found, "per_class": classes}
    Path("results", f"{job.name}_eval_results.json").write_text(json.dumps(record, indent=2))
    done({name: value for name, value in found.items() if not isinstance(value, dict)})


def add_local(folder: Path, names: list[str]) -> None:
    """Make folders of labelled texts known to SAEBench beside its own data sets."""
    own, files = dataset_utils.get_multi_label_train_test_data, {}
    for name in names:
        files[name] = [pd.read_json(folder / name / f"{side}.jsonl", lines=True) for side in ("train", "test")]
        for table in files[name]:
            table["label"] = table["label"].astype(str)
        dataset_info.chosen_classes_per_dataset[name] = sorted(set(files[name][0]["label"]))

    def texts(name: str, train: int, test: int, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        if name not in files:
            return own(name, train, test, seed)
        classes = dataset_info.chosen_classes_per_dataset[name]

        def some(table: pd.DataFrame, texts: int) -> dict[str, list[str]]:
            return dataset_utils.gather_dataset_from_df(table, classes, texts // 2, "label", "text", seed)

        return some(files[name][0], train), some(files[name][1], test)

    dataset_utils.get_multi_label_train_test_data = texts


if __name__ == "__main__":
    main(BenchJob.given())
