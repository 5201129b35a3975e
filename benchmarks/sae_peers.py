"""Worker: one training step of an SAE on given activations, in one of five projects. Started by `sae_step.py`.

Every peer takes the step that its own trainer takes, as far as that can be had without a language model, so with the
bookkeeping that it does at every step (which features fired, the learning rate's schedule). Only the peer that is asked
for is imported, and of endwise only what stands beside this file, so that each may live in an environment of its own.
"""

import importlib
import itertools
import os
import sys
import types
from abc import abstractmethod
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from harness import Side, serve

LEARNING_RATE = 1e-7
STEPS = 1_000_000
SPARSITY = 4.0
POSITIVE = 2
"""Positive pre-activations of top-k dictionaries with lowered biases, as a multiple of k."""
SILENT = -1e3
"""Bias of a feature that never fires."""
SILENCE = 1_000_000_000
"""Tokens that it has not fired on."""
GROUPS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Shares of the features that each group of a Matryoshka dictionary has."""


class Peer(Side):
    """Builds its SAE for the activations; `l0` is that of the last step."""

    package: str
    rows: Tensor

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            spec: `threads`, `rows` (of activations), `d_model`, `d_sae`, `l0` (for those whose time depends on it;
                None: as initialised), `k` (of sparsify's TopK), `seed`, `architecture` (unset: ReLU), `device` (unset:
                a processor), and of ours
                `lowered` (biases of top-k dictionaries), `aux` (whether a tenth of the features is dead and predicts).
        """
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(spec["seed"])
        self.rows = torch.randn(spec["rows"], spec["d_model"]).to(spec.get("device", "cpu"))
        self.make(spec)
        return {"versions": {self.package: version(self.package), "torch": version("torch")}}

    @abstractmethod
    def make(self, spec: dict[str, Any]) -> None: ...

    @abstractmethod
    def l0(self) -> float: ...


class Endwise(Peer):
    package = "endwise"

    def make(self, spec: dict[str, Any]) -> None:
        from endwise.models.language_model import Clean
        from endwise.tokens import TokenBatch
        from endwise.training.making import new_trainee
        from endwise.training.step import take_step
        from ours import bias_shift, gpt2_of_width, run_config
        from shapes import OBJECTIVES, Shape

        rows, width = self.rows.shape
        shape = Shape("gpt2", 1, width, 1, 8, rows, rows, batch=1, layer=0, d_sae=spec["d_sae"])
        model = gpt2_of_width(shape, self.rows.device)
        architecture = spec.get("architecture", "standard")
        dictionary: dict[str, Any] = {"architecture": architecture}
        dictionary |= {"k": round(spec["l0"] or spec["k"])} if "topk" in architecture else {}
        dictionary |= {"aux": 1 / 32, "dead_window": SILENCE} if spec.get("aux") else {}
        settings = {"shape": vars(shape), "precision": spec.get("precision", "exact"), "dictionary": dictionary}
        trainee = new_trainee(run_config(settings, OBJECTIVES["local"]), model, STEPS)
        state = {name: tensor.detach() for name, tensor in trainee.sae.state_dict().items()}
        if spec["l0"] is not None:
            chosen = spec["l0"] * (POSITIVE if "topk" in architecture else 1)
            shift = bias_shift(self.rows[:512], state["encoder"], state["b_enc"], chosen)
            if architecture == "jumprelu":
                typical = torch.addmm(state["b_enc"], self.rows[:512], state["encoder"].T).square().mean().sqrt()
                state |= {"unit": typical, "threshold": torch.full_like(state["threshold"], shift)}
            elif "topk" not in architecture or spec.get("lowered"):
                state |= {name: state[name] - shift for name in ("b_enc", "b_mag") if name in state}
        if spec.get("aux"):
            state["b_enc"] = state["b_enc"].clone()
            state["b_enc"][::10] = SILENT
        trainee.sae.load_state_dict(state)
        if spec.get("aux"):
            trainee.tokens = SILENCE
            trainee.last_fired.fill_(SILENCE)
            trainee.last_fired[::10] = -1
        tokens = torch.zeros(1, rows, dtype=torch.int64, device=self.rows.device)
        clean = Clean(tokens, {trainee.site: self.rows[None]}, None)
        model.clean = lambda *_args, **_kwargs: clean  # the model does not run: its pass is given
        batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        self.trainee = trainee
        self.take_step = lambda: take_step(model, [trainee], batch)

    def step(self) -> None:
        self.take_step()

    def l0(self) -> float:
        return float(self.trainee.report()["l0"])


class Reference(Peer):
    """The paper's own code: its SAE, its loss of a local run, clipping, Adam, as its training loop joins them."""

    package = "e2e-sae"

    def make(self, spec: dict[str, Any]) -> None:
        from reference import import_reference

        import_reference(spec.get("source"))
        from e2e_sae.hooks import sae_hook  # type: ignore[pyrefly:missing-import]
        from e2e_sae.losses import LossConfigs, calc_loss  # type: ignore[pyrefly:missing-import]
        from e2e_sae.models.sparsifiers import SAE  # type: ignore[pyrefly:missing-import]

        self.sae_hook, self.calc_loss = sae_hook, calc_loss
        self.sae = SAE(spec["d_model"], spec["d_sae"]).to(self.rows.device)
        self.losses = LossConfigs(
            sparsity={"coeff": SPARSITY}, in_to_orig=None, out_to_orig=None, out_to_in={"coeff": 1.0}, logits_kl=None
        )
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE)

    def step(self) -> None:
        found: dict[str, Any] = {}
        self.sae_hook(self.rows.detach().clone(), None, self.sae, found, "site")
        loss, _ = self.calc_loss({"site": self.rows}, found, None, None, self.losses)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def l0(self) -> float:
        return _l0(self.sae(self.rows)[1])


class SAELens(Peer):
    """A training SAE of SAELens in its own trainer: `SAETrainer.step`, which clips to norm 1."""

    package = "sae-lens"

    def make(self, spec: dict[str, Any]) -> None:
        import sae_lens  # type: ignore[pyrefly:missing-import]
        from sae_lens.config import SAETrainerConfig  # type: ignore[pyrefly:missing-import]
        from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[pyrefly:missing-import]

        name, own = {
            "standard": ("Standard", {"l1_coefficient": SPARSITY}),
            "gated": ("Gated", {"l1_coefficient": SPARSITY}),
            "jumprelu": ("JumpReLU", {"l0_coefficient": SPARSITY}),
            "topk": ("TopK", {}),
            "batchtopk": ("BatchTopK", {}),
            "matryoshka_batchtopk": ("MatryoshkaBatchTopK", {"matryoshka_widths": prefixes(spec["d_sae"])}),
        }[spec.get("architecture", "standard")]
        own |= {"k": round(spec["l0"] or spec["k"])} if name.endswith("TopK") else {}
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=spec["d_model"], d_sae=spec["d_sae"], **own)
        on = str(self.rows.device)
        settings = SAETrainerConfig(
            STEPS * spec["rows"], spec["rows"], lr=LEARNING_RATE, lr_end=LEARNING_RATE, device=on
        )
        sae = getattr(sae_lens, f"{name}TrainingSAE")(config).to(on)
        self.trainer = SAETrainer(settings, sae, self._activations())

    def _activations(self) -> Iterator[Tensor]:
        while True:
            yield self.rows

    def step(self) -> None:
        self.trainer.step(self.rows)

    @torch.no_grad()
    def l0(self) -> float:
        return _l0(self.trainer.sae.encode(self.rows))


class DictionaryLearning(Peer):
    """`update` of a trainer of saprmarks/dictionary_learning; the standard one does not clip, and keeps its columns at
    norm 1.
    """

    package = "dictionary-learning"

    def make(self, spec: dict[str, Any]) -> None:
        # The package imports nnsight for a buffer of activations that is not used here.
        sys.modules.setdefault("nnsight", types.ModuleType("nnsight"))
        if not hasattr(sys.modules["nnsight"], "LanguageModel"):
            sys.modules["nnsight"].LanguageModel = object  # type: ignore[pyrefly:missing-attribute]
        module, name, own = {
            "standard": ("standard", "StandardTrainer", {"l1_penalty": SPARSITY}),
            "gated": ("gdm", "GatedSAETrainer", {"l1_penalty": SPARSITY}),
            "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": spec["l0"]}),
            "topk": ("top_k", "TopKTrainer", {}),
            "batchtopk": ("batch_top_k", "BatchTopKTrainer", {}),
            "matryoshka_batchtopk": (
                "matryoshka_batch_top_k",
                "MatryoshkaBatchTopKTrainer",
                {"group_fractions": list(GROUPS)},
            ),
        }[spec.get("architecture", "standard")]
        own |= {"k": round(spec["l0"] or spec["k"])} if "TopK" in name else {}
        self.trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
            steps=STEPS,
            activation_dim=spec["d_model"],
            dict_size=spec["d_sae"],
            layer=0,
            lm_name="none",
            lr=LEARNING_RATE,
            device=str(self.rows.device),
            **own,
        )
        self.done, self.by_batch = 0, "BatchTopK" in name

    def step(self) -> None:
        self.trainer.update(self.done, self.rows)
        self.done += 1

    @torch.no_grad()
    def l0(self) -> float:
        encode = self.trainer.ae.encode
        return _l0(encode(self.rows, use_threshold=False) if self.by_batch else encode(self.rows))


class Sparsify(Peer):
    """EleutherAI's TopK SAE. Its trainer needs a language model, so the parts of its step are joined here as there:
    unit columns, forward, backward of the unexplained variance, the columns' parallel gradient taken out, Adam.
    """

    package = "eai-sparsify"

    def make(self, spec: dict[str, Any]) -> None:
        if self.rows.device.type == "cpu":  # where Triton is installed it would be taken
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[pyrefly:missing-import]

        self.k = spec["k"]
        sae = SparseCoder(spec["d_model"], SparseCoderConfig(num_latents=spec["d_sae"], k=self.k))
        self.sae = sae.to(self.rows.device)
        self.sae.b_dec.data = self.rows.mean(0)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE)
        self.since_fired = torch.zeros(spec["d_sae"], dtype=torch.int64, device=self.rows.device)

    def step(self) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        variance = (self.rows - self.rows.mean(0)).pow(2).sum()
        out = self.sae(x=self.rows, y=self.rows, dead_mask=None, total_variance=variance)
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(self.rows)
        self.since_fired[out.latent_indices.flatten()] = 0

    def l0(self) -> float:
        return float(self.k)


def prefixes(d_sae: int) -> list[int]:
    """Numbers of features with which a Matryoshka dictionary's groups end."""
    return [round(end * d_sae) for end in itertools.accumulate(GROUPS)]


def _l0(latents: Tensor) -> float:
    return float(latents.count_nonzero()) / len(latents)


PEERS: dict[str, type[Peer]] = {
    "ours": Endwise,
    "reference": Reference,
    "saelens": SAELens,
    "dictionary_learning": DictionaryLearning,
    "sparsify": Sparsify,
}


class Chosen(Side):
    """Becomes the peer that its specification names."""

    def build(self, spec: dict[str, Any]) -> dict[str, Any]:
        self.peer = PEERS[spec["peer"]]()
        return self.peer.build(spec)

    def step(self) -> None:
        self.peer.step()

    def l0(self) -> float:
        return self.peer.l0()


if __name__ == "__main__":
    serve(Chosen())
