"""Results of sparsify against slow definitions in float64: forward, losses, gradients, and 20 steps of training."""

import pytest
import torch
from safetensors.torch import load_file

from rivals import batches, rival, rivals

TRAINED = rivals("eai_sparsify")
INFERENCE = rivals("eai_sparsify", "inference")


def close(ours, theirs, tolerance=3e-6):
    torch.testing.assert_close(torch.as_tensor(ours).detach().double(), theirs.double(), atol=tolerance, rtol=tolerance)


def parameters(tensors):
    return {key: tensor.double().requires_grad_() for key, tensor in tensors.items()}


def target(x):
    """Targets of the transcoders."""
    return (x.flip(-1) * 0.8).sin() + 0.3 * x


class Pass:
    """One pass of a sparse coder: `pre`, `latents`, `out` and `losses`, with the gradients that the rival gives."""

    def __init__(self, p, x, y, settings, k=None, dead=None):
        self.p, self.coder = p, settings["coder"]
        self.k = k or self.coder["k"]
        z = (x if self.coder["transcode"] else x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
        self.pre = z.relu().detach()  # nothing flows back through what was not selected
        self.chosen = self.selected()
        # Whatever is selected has the gradient of z, also where the ReLU is flat.
        through = z + (self.pre - z).detach()
        self.latents = torch.where(self.chosen, through, 0)
        self.out = self.latents @ p["W_dec"] + p["b_dec"]
        if "W_skip" in p:
            self.out = self.out + x @ p["W_skip"].T
        variance = ((y - y.mean(0)) ** 2).sum()
        self.losses = {"fvu": ((y - self.out) ** 2).sum() / variance}
        self.losses["auxk_loss"] = self.auxiliary((y - self.out).detach(), dead) / variance
        wide = torch.zeros((), dtype=torch.double)
        if self.coder["multi_topk"]:
            wide = ((self.largest(self.pre, 4 * self.k) @ p["W_dec"] + p["b_dec"] - y) ** 2).sum() / variance
        self.losses["multi_topk_fvu"] = wide
        alpha = settings.get("training", {}).get("auxk_alpha", 0)
        self.total = self.losses["fvu"] + alpha * self.losses["auxk_loss"] + wide / 8

    def selected(self):
        """The k largest of a row; of groupmax, the largest of each of k runs of neighbours."""
        groups = self.pre.unflatten(-1, (self.k, -1)) if self.coder["activation"] == "groupmax" else self.pre
        best = groups.argmax(-1, keepdim=True) if groups.ndim == 3 else groups.topk(self.k, -1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).reshape(self.pre.shape)

    def largest(self, z, k):
        kept = z.topk(k, dim=-1)
        return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)

    def auxiliary(self, residual, dead):
        most = residual.shape[-1] // 2
        if dead is None or not dead.any():
            return torch.zeros((), dtype=torch.double)
        of_dead = self.largest(self.pre[:, dead], min(most, int(dead.sum())))
        chosen = torch.zeros_like(self.pre).masked_scatter(dead.expand_as(self.pre), of_dead)
        return min(int(dead.sum()) / most, 1.0) * ((chosen @ self.p["W_dec"] - residual) ** 2).sum()


def first(stored, dead=None):
    """The rival's single pass on the first batch."""
    p, x = parameters(stored.under("start")), stored.tensors["x"].double()
    y = stored.tensors.get("y", x).double()
    return p, Pass(p, x, y, stored.settings, dead=dead)


def same_losses_and_gradients(p, ours, losses, gradients):
    for term, value in losses.items():
        close(ours.total if term == "total" else ours.losses[term], value)
    ours.total.backward()
    assert gradients.keys() == p.keys()
    for key, gradient in gradients.items():
        close(p[key].grad, gradient)


@pytest.mark.parametrize("name", TRAINED)
def test_one_pass(name):
    stored = rival(name)
    p, ours = first(stored)
    for key in ("pre", "latents", "out"):
        close(getattr(ours, key), stored.tensors[key])
    same_losses_and_gradients(p, ours, stored.under("loss"), stored.under("grad"))


@pytest.mark.parametrize("name", [name for name in TRAINED if "dead.mask" in rival(name).tensors])
def test_dead_features(name):
    """The auxiliary term trains the decoder's rows, and nothing of the encoder."""
    stored = rival(name)
    p, ours = first(stored, stored.tensors["dead.mask"])
    same_losses_and_gradients(p, ours, stored.under("dead.loss"), stored.under("dead.grad"))
    assert stored.tensors["dead.loss.auxk_loss"] > 0
    for key, gradient in stored.under("dead.grad").items():
        assert torch.equal(gradient, stored.tensors[f"grad.{key}"]) == (key != "W_dec")


@pytest.mark.parametrize("name", ["topk", "groupmax"])
def test_fewer_positives_than_k(name):
    """Selected features that the ReLU made 0 have a gradient; which of them are selected the rival's sort decides."""
    stored = rival(f"eai_sparsify/{name}")
    p = parameters(stored.under("start") | {"encoder.bias": stored.tensors["few.b_enc"]})
    chosen = torch.zeros(16, 24, dtype=torch.bool).scatter(1, stored.tensors["few.indices"], True)
    x = stored.tensors["x"].double()

    class AsChosen(Pass):
        def selected(self):
            return chosen

    ours = AsChosen(p, x, x, stored.settings)
    assert (chosen & (ours.pre == 0)).any()
    close(ours.latents, stored.tensors["few.latents"])
    close(Pass(p, x, x, stored.settings).latents, stored.tensors["few.latents"])
    same_losses_and_gradients(p, ours, {}, stored.under("few.grad"))


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps(name):
    """Rows of norm 1 before a pass, their direction out of the gradient after it; Adam, without clipping."""
    stored = rival(name)
    settings, p = stored.settings, parameters(stored.under("start"))
    unit = settings["coder"]["normalize_decoder"] and not settings["coder"]["transcode"]
    adam = torch.optim.Adam(p.values(), lr=settings["learning_rate"], betas=settings["betas"])
    silent, limit = torch.zeros(24), settings["training"].get("dead_feature_threshold", 10_000_000)
    decay = settings["training"].get("k_decay_steps", 0)
    for step, x in enumerate(batches().double()):
        # The k of a step is set at the end of the one before, from a count that is not yet raised.
        late = max(step - 1, 0)
        k = 4 if late >= decay else round(24 * (1 - late / decay) + 4 * late / decay)
        if unit:
            p["W_dec"].data /= p["W_dec"].data.norm(dim=1, keepdim=True)
        dead = silent > limit
        y = target(x) if settings["coder"]["transcode"] else x
        ours = Pass(p, x, y, settings, k, dead)
        assert (stored.tensors["steps.k"][step], stored.tensors["steps.dead"][step]) == (k, dead.sum())
        for term, value in {**ours.losses, "total": ours.total}.items():
            close(value, stored.tensors[f"steps.{term}"][step], 3e-6)
        adam.zero_grad()
        ours.total.backward()
        if unit:
            W_dec = p["W_dec"]
            W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
        adam.step()
        silent = torch.where(ours.chosen.any(0), 0, silent + len(x))
        if step in (0, 19):
            for key, value in p.items():
                close(value, stored.tensors[f"after_{step + 1}.{key}"], 2e-6)


def test_initialisation():
    """Uniform to 1/√d, the decoder as the encoder, with unit rows if it keeps them; a transcoder's is zero."""
    for name, norms in (("topk", 1.0), ("topk_free", None), ("skip_transcoder", 0.0)):
        init = rival(f"eai_sparsify/{name}").under("init")
        encoder = init["encoder.weight"]
        assert encoder.abs().max() <= 8**-0.5 and encoder.abs().max() > 0.9 * 8**-0.5
        own = encoder.norm(dim=1) if norms is None else torch.full((24,), norms)
        close(init["W_dec"], encoder / encoder.norm(dim=1, keepdim=True) * own[:, None], 1e-6)
        assert not any(init[key].any() for key in ("encoder.bias", "b_dec"))


@pytest.mark.parametrize("name", INFERENCE)
def test_inference(name):
    stored = rival(name)
    x = stored.tensors["inputs"].double()
    ours = Pass(parameters(load_file(stored.folder / "sae.safetensors")), x, x, stored.settings)
    close(ours.latents, stored.tensors["latents"])
    close(ours.out, stored.tensors["outputs"])
