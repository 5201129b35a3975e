"""Results of SAELens against slow definitions in float64: forward, losses, gradients, and 20 steps of training."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from rivals import batches, rival, rivals

TRAINED = rivals("sae_lens")
INFERENCE = rivals("sae_lens", "inference")
FOLDED = rivals("sae_lens", "folded_scale") + rivals("sae_lens", "folded_whitening")


def close(ours, theirs, tolerance=3e-6):
    torch.testing.assert_close(ours.detach().double(), theirs.double(), atol=tolerance, rtol=tolerance)


def normed(x, config):
    """The input as the SAE sees it, and what its output is multiplied by and shifted by."""
    kind, one, none = config.get("normalize_activations"), torch.ones(1), torch.zeros(1)
    if kind == "layer_norm":
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + 1e-5), std, mean
    if kind == "constant_norm_rescale":
        factor = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
        return x * factor, 1 / factor, none
    return x, one, none


def largest(z, k):
    """`z` where it is among the k largest of its last axis, zero elsewhere."""
    kept = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)


def jump(z, threshold, config):
    """z·H and H with H = [z > θ], and the straight-through gradients: −(θ/ε)·K and −(1/ε)·K with respect to θ."""
    bandwidth = config["jumprelu_bandwidth"]
    hard = (z > threshold).double()
    near = (((z - threshold) / bandwidth).abs() < 0.5).double() / bandwidth
    distance = (z if config["jumprelu_ste_to_input"] else z.detach()) - threshold
    through = near.detach() * (distance - distance.detach())  # zero, with a gradient
    return z * hard + threshold.detach() * through, hard + through


class Pass:
    """One training pass of an architecture: `pre`, `latents`, `out` and `losses`, all with gradients."""

    def __init__(self, p, x, settings, dead=None):
        self.p, self.x, self.config, self.dead = p, x, settings["config"], dead
        self.norms = p["W_dec"].norm(dim=1)
        seen, scale, shift = normed(x, self.config)
        self.seen = seen - p["b_dec"] * self.config["apply_b_dec_to_input"]
        parts = {"standard": self.standard, "gated": self.gated, "jumprelu": self.jumprelu}
        losses = parts.get(settings["architecture"], self.top)()
        self.out = (self.decoded(self.latents) + p["b_dec"]) * scale + shift
        self.losses = {"mse_loss": self.error(self.out)} | losses()
        self.total = sum(self.losses.values())

    def error(self, out):
        return ((out - self.x) ** 2).sum(-1).mean()

    def decoded(self, latents, start=0, end=None):
        """Without b_dec, by the features from `start` to `end`."""
        W_dec = self.p["W_dec"]
        if self.config.get("rescale_acts_by_decoder_norm"):
            W_dec = W_dec / self.norms[:, None]
        return latents[:, start:end] @ W_dec[start:end]

    def standard(self):
        self.pre = self.seen @ self.p["W_enc"] + self.p["b_enc"]
        self.latents = self.pre.relu()
        p = self.config["lp_norm"]
        # Zeros are left out of the sum: their gradient is not finite for p < 1.
        powers = (self.latents * self.norms).clamp(min=1e-300) ** p
        powers = torch.where(self.latents > 0, powers, 0)
        return lambda: {"l1_loss": self.config["l1_coefficient"] * (powers.sum(-1) ** (1 / p)).mean()}

    def gated(self):
        p, c = self.p, self.config["l1_coefficient"]
        gate = self.seen @ p["W_enc"] + p["b_gate"]
        self.pre = self.seen @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
        self.latents = (gate > 0) * self.pre.relu()
        return lambda: {
            "l1_loss": c * (gate.relu() * self.norms).sum(-1).mean(),
            "auxiliary_reconstruction_loss": self.error(gate.relu() @ p["W_dec"] + p["b_dec"]),
        }

    def jumprelu(self):
        c = self.config
        self.pre = self.seen @ self.p["W_enc"] + self.p["b_enc"]
        self.latents, open_ = jump(self.pre, self.p["threshold"], c)

        def losses():
            if c["jumprelu_sparsity_loss_mode"] == "tanh":
                each = torch.tanh(c["jumprelu_tanh_scale"] * self.latents * self.norms).sum(-1)
            else:
                each = open_.sum(-1)
            if c["jumprelu_sparsity_loss_mode"] == "quadratic":
                each = 2 / c["target_l0"] * (each - c["target_l0"]) ** 2
            terms = {"l0_loss": (c["l0_coefficient"] * each).mean()}
            if c["pre_act_loss_coefficient"] is None:
                return terms
            dead = torch.zeros_like(self.norms) if self.dead is None else self.dead
            short = ((self.p["threshold"] - self.pre).relu() * dead * self.norms).sum(-1).mean()
            return terms | {"pre_act_loss": c["pre_act_loss_coefficient"] * short}

        return losses

    def top(self):
        c = self.config
        self.pre = self.seen @ self.p["W_enc"] + self.p["b_enc"]
        if c["rescale_acts_by_decoder_norm"]:
            self.pre = self.pre * self.norms
        if "topk_threshold_lr" in c:
            acts = self.pre.relu()
            self.latents = largest(acts.flatten(), int(c["k"] * len(acts))).reshape(acts.shape)
        else:
            self.latents = largest(self.pre, c["k"]).relu()
        return self.top_losses

    def top_losses(self):
        widths = self.config.get("matryoshka_widths", [self.pre.shape[1]])
        inner = {f"inner_mse_loss_{w}": self.error(self.decoded(self.latents, 0, w) + self.p["b_dec"]) for w in widths}
        del inner[f"inner_mse_loss_{widths[-1]}"]  # it is mse_loss
        edges = [0, *widths] if self.config.get("use_matryoshka_aux_loss") else [0, widths[-1]]
        aux = sum(self.auxiliary(start, end) for start, end in itertools.pairwise(edges))
        return {"auxiliary_reconstruction_loss": self.config["aux_loss_coefficient"] * aux} | inner

    def auxiliary(self, start, end):
        """Reconstruct the error left by the groups up to one, from the dead features of that group."""
        dead = torch.zeros(self.pre.shape[1], dtype=torch.bool)
        dead[start:end] = False if self.dead is None else self.dead[start:end]
        most = self.x.shape[-1] // 2
        if not dead.any():
            return torch.zeros((), dtype=torch.double)
        left = (self.x - self.decoded(self.latents, 0, end) - self.p["b_dec"]).detach()
        of_dead = largest(self.pre[:, dead], min(most, int(dead.sum())))  # pre-activations, without a ReLU
        chosen = torch.zeros_like(self.pre).masked_scatter(dead.expand_as(self.pre), of_dead)
        error = ((self.decoded(chosen) - left) ** 2).sum(-1).mean()
        return min(int(dead.sum()) / most, 1.0) * error


def parameters(tensors):
    """Float64 copies that take gradients; the moving threshold is no parameter."""
    return {name: t.double().requires_grad_() for name, t in tensors.items() if name != "topk_threshold"}


@pytest.mark.parametrize("name", TRAINED)
def test_one_pass(name):
    """Forward, every loss, and every gradient: of the total and of each term but the MSE."""
    stored = rival(name)
    p = parameters(stored.under("start"))
    ours = Pass(p, stored.tensors["x"].double(), stored.settings)
    for key in ("pre", "latents", "out"):
        close(getattr(ours, key), stored.tensors[key])
    losses = {**ours.losses, "total": ours.total}
    for term, value in stored.under("loss").items():
        close(losses[term], value)
    for term, loss in losses.items():
        theirs = stored.under("grad" if term == "total" else f"grad_of.{term}")
        if term != "mse_loss" and loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(p.values()), retain_graph=True, allow_unused=True)
            for (key, tensor), gradient in zip(p.items(), gradients, strict=True):
                none = torch.zeros_like(tensor)
                close(none if gradient is None else gradient, theirs.get(key, none))


@pytest.mark.parametrize("name", [name for name in TRAINED if "dead.mask" in rival(name).tensors])
def test_dead_features(name):
    stored = rival(name)
    p = parameters(stored.under("start"))
    ours = Pass(p, stored.tensors["x"].double(), stored.settings, stored.tensors["dead.mask"])
    for term, value in stored.under("dead.loss").items():
        close(ours.total if term == "total" else ours.losses[term], value)
    assert sum(stored.under("dead.loss").values()) > sum(stored.under("loss").values())
    ours.total.backward()
    for key, gradient in stored.under("dead.grad").items():
        close(p[key].grad, gradient)


@pytest.mark.parametrize("name", [name for name in TRAINED if "few.b_enc" in rival(name).tensors])
def test_fewer_positives_than_k(name):
    """Values kept beyond the positive ones are zero; the threshold moves towards the smallest that is positive."""
    stored = rival(name)
    start = stored.under("start") | {"b_enc": stored.tensors["few.b_enc"]}
    ours = Pass(parameters(start), stored.tensors["x"].double(), stored.settings)
    close(ours.latents, stored.tensors["few.latents"])
    close(ours.out, stored.tensors["few.out"])
    assert (ours.latents > 0).sum() < stored.settings["config"]["k"] * len(ours.latents)
    if "few.topk_threshold" in stored.tensors:
        close(0.01 * ours.latents[ours.latents > 0].min(), stored.tensors["few.topk_threshold"], 1e-8)


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps(name):
    """Adam on gradients clipped to norm 1; thresholds clamped before a pass; dead are those silent for too many."""
    stored = rival(name)
    settings, p = stored.settings, parameters(stored.under("start"))
    adam = torch.optim.Adam(p.values(), lr=settings["learning_rate"], betas=settings["betas"])
    silent, moving = torch.zeros(len(p["W_dec"])), torch.zeros((), dtype=torch.double)
    for step, x in enumerate(batches()):
        if "threshold" in p:
            p["threshold"].data.clamp_(min=0)
        ours = Pass(p, x.double(), settings, silent > settings["dead_feature_window"])
        assert (silent > settings["dead_feature_window"]).sum() == stored.tensors["steps.dead"][step]
        for term, value in {**ours.losses, "total": ours.total}.items():
            close(value, stored.tensors[f"steps.{term}"][step], 3e-6)
        silent = torch.where((ours.latents != 0).any(0), 0, silent + 1)
        adam.zero_grad()
        ours.total.backward()
        torch.nn.utils.clip_grad_norm_(p.values(), settings["clip_grad_norm"])
        adam.step()
        if "steps.topk_threshold" in stored.tensors:
            moving = 0.99 * moving + 0.01 * ours.latents.detach()[ours.latents > 0].min()
            close(moving, stored.tensors["steps.topk_threshold"][step], 1e-6)
        if step in (0, 19):
            for key, value in p.items():
                close(value, stored.tensors[f"after_{step + 1}.{key}"], 2e-6)


def test_initialisation():
    """Rows of the decoder have norm 0.1, the encoder is its transpose, and all else is zero but JumpReLU's θ."""
    for name in ("standard", "gated", "topk", "batchtopk", "jumprelu_step"):
        init = rival(f"sae_lens/{name}").under("init")
        close(init["W_dec"].norm(dim=1), torch.full((24,), 0.1), 1e-6)
        assert torch.equal(init["W_enc"], init["W_dec"].T)
        rest = {key: tensor for key, tensor in init.items() if not key.startswith("W_")}
        threshold = rest.pop("threshold", None)
        assert threshold is None or torch.equal(threshold, torch.full((24,), 0.3))
        assert not any(tensor.any() for tensor in rest.values())


@pytest.mark.parametrize("name", FOLDED)
def test_folded_norms(name):
    """The folded SAE gives on raw inputs what the other gave on normed ones."""
    stored = rival(name)
    t, config = stored.tensors, {"rescale_acts_by_decoder_norm": False} | stored.settings["config"]
    if "scale" in t:
        norm = batches().norm(dim=-1).double().mean()
        close(math.sqrt(8) / norm, t["scale"], 1e-6)
        close(t["x"] * t["scale"], t["x_normed"])
    else:
        rows = batches().double().reshape(-1, 8)
        close(rows.mean(0), t["mean"], 1e-7)
        close(torch.linalg.inv(rows.T.cov() + 1e-3 * torch.eye(8)), t["matrix"] @ t["matrix"].T, 1e-6)
        close(t["matrix"] @ t["inverse"], torch.eye(8), 1e-7)
        close((t["x"] - t["mean"]) @ t["matrix"], t["x_normed"])
    settings = {"config": {"apply_b_dec_to_input": True, "lp_norm": 1.0} | config}
    settings["architecture"] = stored.settings["architecture"]
    before, after = stored.under("before"), stored.under("after")
    normed_pass = Pass(parameters(before), t["x_normed"].double(), settings)
    norms = 1.0
    if "mean" in t and config["rescale_acts_by_decoder_norm"]:
        settings["config"]["rescale_acts_by_decoder_norm"] = False  # the norms are in the encoder after a whitening
    elif config["rescale_acts_by_decoder_norm"]:
        norms = t["scale"]
    raw_pass = Pass(parameters(after), t["x"].double(), settings)
    close(raw_pass.latents * norms, normed_pass.latents)
    back = normed_pass.out / t["scale"] if "scale" in t else normed_pass.out @ t["inverse"] + t["mean"]
    close(raw_pass.out, back)
    if "topk_threshold" in before:
        close(after["topk_threshold"] * norms, before["topk_threshold"], 1e-7)


def inferred(p, x, config):
    """Latents and output of a saved SAE or transcoder."""
    if config["reshape_activations"] == "hook_z":
        x = x.flatten(1)
    seen, scale, shift = normed(x, config)
    seen = seen - p["b_dec"] * config["apply_b_dec_to_input"]
    if "b_gate" in p:
        gate, pre = seen @ p["W_enc"] + p["b_gate"], seen @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]
        latents = (gate > 0) * pre.relu()
    else:
        pre = seen @ p["W_enc"] + p["b_enc"]
        norms = p["W_dec"].norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(1)
        latents = (largest(pre * norms, config["k"]) if "k" in config else pre).relu()
        latents = latents * (pre > p.get("threshold", torch.zeros(1)))
        p = p | {"W_dec": p["W_dec"] / norms[:, None]}
    out = (latents @ p["W_dec"] + p["b_dec"]) * scale + shift
    return latents, out + x @ p["W_skip"].T if "W_skip" in p else out


@pytest.mark.parametrize("name", INFERENCE)
def test_inference(name):
    """A folder as SAELens wrote it, with what SAELens computes from it."""
    stored = rival(name)
    p = {key: tensor.double() for key, tensor in load_file(stored.folder / "sae_weights.safetensors").items()}
    latents, out = inferred(p, stored.tensors["inputs"].double(), stored.settings["config"])
    close(latents, stored.tensors["latents"])
    close(out.reshape(stored.tensors["outputs"].shape), stored.tensors["outputs"])


@pytest.mark.parametrize("name", ["batchtopk", "batchtopk_rescaled", "matryoshka", "topk_rescaled"])
def test_what_training_saves(name):
    """Decoder norms folded if selection saw them; the moving threshold is every feature's."""
    trained, saved = rival(f"sae_lens/{name}"), rival(f"sae_lens/inference/trained_{name}")
    after, file = trained.under("after_20"), load_file(saved.folder / "sae_weights.safetensors")
    norms = after["W_dec"].norm(dim=1) if name.endswith("rescaled") else torch.ones(24)
    close(file["W_dec"], after["W_dec"] / norms[:, None])
    close(file["W_enc"], after["W_enc"] * norms)
    close(file["b_enc"], after["b_enc"] * norms)
    if "topk_threshold" in after:
        close(file["threshold"], after["topk_threshold"].expand(24))
        assert saved.settings["architecture"] == "jumprelu"
