"""The numbers of rival packages in fixtures/rivals: whole, finite, and all explained."""

import re

import torch
from safetensors.torch import load_file

from rivals import FOLDER, PACKAGES, about, batches, rival, rivals


def stored():
    """The path, below the folder, of every file of fixtures; not the weights of SAEs in folders of their own."""
    paths = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.safetensors")}
    return {path for path in paths if not re.search(r"/(sae_weights|sparsity|sae)\.safetensors$", path)}


def test_every_file_is_in_the_readme_and_in_a_package():
    explained = set(re.findall(r"`([\w/]+\.safetensors)`", (FOLDER / "README.md").read_text()))
    explained = {name for name in explained if "/" in name} | {"inputs.safetensors", "opened.safetensors"}
    packaged = {f"{package}/{case}.safetensors" for package in PACKAGES for case in about(package)["cases"]}
    assert stored() == explained == packaged | {"inputs.safetensors", "opened.safetensors"}


def test_every_number_is_finite():
    for path in FOLDER.rglob("*.safetensors"):
        for key, tensor in load_file(path).items():
            assert tensor.numel() and tensor.double().isfinite().all(), f"{path} {key}"


def test_training_files_are_whole():
    for package in PACKAGES:
        for name in rivals(package):
            file = rival(name)
            assert torch.equal(file.tensors["x"], batches()[0]), name
            start = {key for key, tensor in file.under("start").items() if tensor.is_floating_point()}
            assert start and file.under("after_20").keys() >= start, name
            assert file.under("grad").keys() <= start and file.under("grad"), name
            assert any((file.under("after_20")[key] != file.under("start")[key]).any() for key in start), name
            assert file.tensors["steps.total"].shape == (20,), name


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 1_000_000
