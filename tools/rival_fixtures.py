"""Writes tests/fixtures/rivals: what other packages compute, for tests that compare with them without installing them.

One rival is run at a time, each in an environment of its own, with the CPU build of torch that `constraints.txt` names:

    python -m venv rival && export PIP_CONSTRAINT=constraints.txt
    rival/bin/pip install sae-lens==6.54.12             # brings transformer-lens 3
    rival/bin/pip install dictionary-learning==0.1.0
    rival/bin/pip install eai-sparsify==1.3.3
    rival/bin/python tools/rival_fixtures.py sae-lens   # or dictionary-learning, or eai-sparsify

Everything is drawn from a fixed seed and computed in float32 on one thread: run twice in one environment, it writes the
same bytes. tests/fixtures/rivals/README.md says what each file holds, with the formulas that the rivals compute.

What SAELens makes of files that endwise writes is stored too, in two steps: endwise's environment writes a folder of
every kind, SAELens's opens them, compares latents and outputs, and fails where one differs:

    python tools/rival_fixtures.py written FOLDER
    rival/bin/python tools/rival_fixtures.py open FOLDER

Files of other packages' formats (`tests/helpers/made_formats.py`, and those that endwise writes) are opened by the
packages themselves, likewise in two steps, of which the second fails where latents or outputs differ by more than 1e-5:

    python tools/rival_fixtures.py made FOLDER
    rival/bin/python tools/rival_fixtures.py read FOLDER sae-lens   # or another of `formats_read.PACKAGES`

`e2e-sae` needs e2e-sae 2.1.1; `openai` the repository openai/sparse_autoencoder on PYTHONPATH; `llamascopium`
OpenMOSS/Language-Model-SAEs there, `src`, and beside SAELens the packages that it imports; `lm-saes` the same as it was
in December 2024 (2320def2).
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

RIVALS = {
    "sae-lens": "rival_packages.of_sae_lens",
    "dictionary-learning": "rival_packages.of_dictionary_learning",
    "eai-sparsify": "rival_packages.of_sparsify",
}
"""The module that drives each package."""


def main() -> int:
    """Runs one subcommand; 1 if `open` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for rival in RIVALS:
        commands.add_parser(rival, help=f"write the fixtures of {rival}, which must be installed here")
    for name, does in (("written", "write every kind of file with endwise"), ("open", "open them in SAELens")):
        commands.add_parser(name, help=does).add_argument("folder", type=Path)
    commands.add_parser("made", help="make a file of each format, with endwise").add_argument("folder", type=Path)
    reading = commands.add_parser("read", help="open them in the package")
    reading.add_argument("folder", type=Path)
    reading.add_argument("package", choices=[*RIVALS, "e2e-sae", "llamascopium", "lm-saes", "openai"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if given.command in ("written", "open"):
        module = importlib.import_module(f"rival_packages.{'writing' if given.command == 'written' else 'opening'}")
        return int(module.run(given.folder))
    if given.command in ("made", "read"):
        module = importlib.import_module("rival_packages.formats_read")
        return int(module.make(given.folder) if given.command == "made" else module.read(given.folder, given.package))
    importlib.import_module(RIVALS[given.command]).write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
