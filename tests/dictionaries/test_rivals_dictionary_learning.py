"""Results of dictionary_learning against slow definitions in float64: forward, losses, gradients, and 20 steps."""

import pytest
import torch

from rivals import batches, rival, rivals

TRAINED = rivals("dictionary_learning")
TOP = [name for name in TRAINED if "dead.mask" in rival(name).tensors]
OURS = {"encoder.bias": "b_enc", "bias": "b_dec", "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag"}
NOT_TRAINED = ("k", "group_sizes")
RELU = ("StandardTrainer", "StandardTrainerAprilUpdate", "PAnnealTrainer")


def close(ours, theirs, tolerance=3e-6):
    torch.testing.assert_close(torch.as_tensor(ours).detach().double(), theirs.double(), atol=tolerance, rtol=tolerance)


def oriented(tensors):
    """The tensors by our names, W_enc `[d F]` and W_dec `[F d]`, without what is no parameter."""
    transposed = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
    named = {OURS.get(key, key): tensor for key, tensor in tensors.items() if key not in NOT_TRAINED}
    return {transposed.get(key, key): tensor.T if key in transposed else tensor for key, tensor in named.items()}


def parameters(tensors, trainer):
    """Float64 copies that take gradients; only JumpReLU trains its threshold."""
    own = oriented(tensors)
    if trainer != "JumpReluTrainer":
        own.pop("threshold", None)
    return {key: tensor.double().clone().requires_grad_() for key, tensor in own.items()}


def largest(z, k):
    kept = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, kept.indices, kept.values)


class Run:
    """One trainer in float64: a loss with its terms, and the state that the loss moves."""

    def __init__(self, stored):
        self.trainer, self.settings = stored.settings["trainer"], stored.settings["settings"]
        self.p = parameters(stored.under("start"), self.trainer)
        self.silent, self.dead_after = torch.zeros(24), stored.settings.get("dead_feature_threshold")
        self.threshold = torch.tensor(-1.0, dtype=torch.double)
        self.power, self.next_power, self.queue, self.updates = 1.0, None, [], 0
        self.coefficient = self.settings.get("initial_sparsity_penalty")
        self.of = {"GatedSAETrainer": self.gated, "JumpReluTrainer": self.jumprelu, "PAnnealTrainer": self.p_anneal}

    def loss(self, x, step):
        """The total; `terms` are as the trainer logs them, `latents` and `out` as in training."""
        if "k" in self.settings:
            return self.top(x, step)
        return self.of.get(self.trainer, self.standard)(x, step)

    def error(self, x, out):
        return ((x - out) ** 2).sum(-1).mean()

    def decoded(self, latents):
        return latents @ self.p["W_dec"] + self.p["b_dec"]

    def relu(self, x):
        self.latents = ((x - self.p["b_dec"]) @ self.p["W_enc"] + self.p["b_enc"]).relu()
        self.out = self.decoded(self.latents)
        return self.error(x, self.out)

    def warm(self, step):
        warmup = self.settings["sparsity_warmup_steps"]
        return min(step / warmup, 1.0) if warmup else 1.0

    def standard(self, x, step):
        mse = self.relu(x)
        april = self.trainer == "StandardTrainerAprilUpdate"
        l1 = (self.latents * (self.p["W_dec"].norm(dim=1) if april else 1)).sum(-1).mean()
        distance = (x - self.out).norm(dim=-1).mean()
        self.terms = {"mse_loss": mse, "sparsity_loss": l1, "l2_loss": distance}
        return mse + self.settings["l1_penalty"] * self.warm(step) * l1

    def lp(self, power):
        f = self.latents
        powers = torch.where(f > 0, f.clamp(min=1e-300) ** power, 0).sum(-1)
        return (powers if self.settings["sparsity_function"] == "Lp^p" else powers ** (1 / power)).mean()

    def p_anneal(self, x, step):
        """In its update steps it takes the next p, and a coefficient that would not have changed the mean penalty."""
        mse, sparsity = self.relu(x), self.lp(self.power)
        self.terms = {"lp_loss": sparsity, "scaled_lp_loss": sparsity * self.coefficient}
        total = mse + self.terms["scaled_lp_loss"]
        if self.next_power is not None:
            self.queue = [*self.queue, (sparsity.item(), self.lp(self.next_power).item())]
            self.queue = self.queue[-self.settings["sparsity_queue_length"] :]
        if step in (4, 8, 12, 16):
            if self.queue:
                now, then = (sum(values) for values in zip(*self.queue, strict=True))
                self.coefficient *= now / then
            powers = [1 - 0.8 * index / 3 for index in range(4)]
            self.power, self.next_power = powers[self.updates], [*powers, 0.2][self.updates + 1]
            self.updates += 1
        return total

    def gated(self, x, step):
        p = self.p
        shared = (x - p["b_dec"]) @ p["W_enc"]
        gate = shared + p["b_gate"]
        self.latents = (gate > 0) * (shared * p["r_mag"].exp() + p["b_mag"]).relu()
        self.out = self.decoded(self.latents)
        aux = self.error(x, gate.relu() @ p["W_dec"].detach() + p["b_dec"].detach())
        sparsity = gate.relu().sum(-1).mean()
        self.terms = {"mse_loss": self.error(x, self.out), "sparsity_loss": sparsity, "aux_loss": aux}
        return self.terms["mse_loss"] + self.settings["l1_penalty"] * self.warm(step) * sparsity + aux

    def jumprelu(self, x, step):
        """The step function is of the latents, after the jump; its gradient goes to θ alone."""
        z, theta, bandwidth = x @ self.p["W_enc"] + self.p["b_enc"], self.p["threshold"], self.settings["bandwidth"]
        move = theta - theta.detach()

        def near(u):
            return (((u - theta) / bandwidth).abs() < 0.5).detach().double() / bandwidth

        self.latents = z * (z > theta) - theta.detach() * near(z) * move
        self.out = self.decoded(self.latents)
        f = self.latents.detach()
        l0 = ((f > theta).double() - near(f) * move).sum(-1).mean()
        self.terms = {"l2_loss": self.error(x, self.out)}
        penalty = self.settings["sparsity_penalty"] * (l0 / self.settings["target_l0"] - 1) ** 2
        return self.terms["l2_loss"] + self.warm(step) * penalty

    def top(self, x, step):
        k, each = self.settings["k"], self.trainer == "TopKTrainer"
        self.positive = ((x - self.p["b_dec"]) @ self.p["W_enc"] + self.p["b_enc"]).relu()
        flat = self.positive if each else self.positive.flatten()
        self.latents = largest(flat, k if each else k * len(x)).reshape(self.positive.shape)
        if step > self.settings["threshold_start_step"]:
            self.move_threshold(each)
        self.out = self.decoded(self.latents)
        self.silent = torch.where((self.latents > 0).any(0), 0, self.silent + len(x))
        self.dead = self.silent >= self.dead_after
        aux = self.auxiliary(x, self.dead)
        errors = [self.error(x, self.out)]
        if "group_fractions" in self.settings:
            prefixes = [self.latents * (torch.arange(24) < width) for width in (6, 12, 24)]
            errors = [self.error(x, self.decoded(prefix)) / 3 for prefix in prefixes]
        l2 = sum(errors) / len(errors)
        self.terms = {"l2_loss": l2, "auxk_loss": aux, "min_l2_loss": min(errors), "max_l2_loss": max(errors)}
        return l2 + self.settings["auxk_alpha"] * aux

    def move_threshold(self, each):
        """Towards the batch's smallest positive latent, or the mean of every row's; the first is taken as it is."""
        kept = torch.where(self.latents > 0, self.latents, torch.inf).detach()
        smallest = kept.min(1).values.mean() if each else kept.min()
        beta = self.settings["threshold_beta"]
        self.threshold = smallest if self.threshold < 0 else beta * self.threshold + (1 - beta) * smallest

    def auxiliary(self, x, dead):
        """Residual as the largest of the dead make it, divided by the residual's variance; no bias."""
        if not dead.any():
            return torch.zeros((), dtype=torch.double)
        residual = (x - self.out).detach()
        of_dead = largest(self.positive[:, dead], min(4, int(dead.sum())))
        chosen = torch.zeros_like(self.positive).masked_scatter(dead.expand_as(self.positive), of_dead)
        variance = ((residual - residual.mean(0)) ** 2).sum(-1).mean()
        return self.error(residual, chosen @ self.p["W_dec"]) / variance

    def update(self, adam):
        """The gradient of W_dec without its part along the rows, clipping, Adam, and rows of norm 1."""
        W_dec = self.p["W_dec"]
        unit = self.trainer != "StandardTrainerAprilUpdate"
        if unit:
            rows = W_dec.detach() / W_dec.detach().norm(dim=1, keepdim=True)
            W_dec.grad -= (W_dec.grad * rows).sum(1, keepdim=True) * rows
        if "k" in self.settings or self.trainer in ("JumpReluTrainer", "StandardTrainerAprilUpdate"):
            torch.nn.utils.clip_grad_norm_(self.p.values(), 1.0)
        adam.step()
        if unit:
            W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", TRAINED)
def test_one_pass(name):
    stored = rival(name)
    run = Run(stored)
    total = run.loss(stored.tensors["x"].double(), 0)
    close(run.latents, stored.tensors["latents"])
    close(run.out, stored.tensors["out"])
    close(total, stored.tensors["loss.total"])
    for term, value in stored.under("loss").items():
        if term != "total":
            close(run.terms[term], value)
    total.backward()
    for key, gradient in oriented(stored.under("grad")).items():
        if key in run.p:
            close(run.p[key].grad, gradient)


@pytest.mark.parametrize("name", ["gated", "jumprelu"])
def test_gradients_without_the_penalty(name):
    stored = rival(f"dictionary_learning/{name}")
    run = Run(stored)
    run.settings |= {"l1_penalty": 0, "sparsity_penalty": 0}
    run.loss(stored.tensors["x"].double(), 0).backward()
    for key, gradient in oriented(stored.under("grad_without_sparsity")).items():
        close(run.p[key].grad, gradient)


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps(name):
    stored = rival(name)
    run = Run(stored)
    adam = torch.optim.Adam(run.p.values(), lr=stored.settings["learning_rate"], betas=stored.settings["betas"])
    for step, x in enumerate(batches()):
        for key, value in (("p", run.power), ("sparsity_coeff", run.coefficient)):
            if f"steps.{key}" in stored.tensors:
                close(value, stored.tensors[f"steps.{key}"][step], 3e-6)
        adam.zero_grad()
        total = run.loss(x.double(), step)
        close(total, stored.tensors["steps.total"][step], 3e-6)
        total.backward()
        run.update(adam)
        if "steps.threshold" in stored.tensors:
            close(run.threshold, stored.tensors["steps.threshold"][step], 3e-6)
            assert run.dead.sum() == stored.tensors["steps.dead"][step]
        if step in (0, 19):
            after = oriented(stored.under(f"after_{step + 1}"))
            for key, value in run.p.items():
                close(value, after[key], 2e-6)


@pytest.mark.parametrize("name", TOP)
def test_dead_features(name):
    stored = rival(name)
    run = Run(stored)
    run.loss(stored.tensors["x"].double(), 0)
    loss = run.auxiliary(stored.tensors["x"].double(), stored.tensors["dead.mask"])
    close(loss, stored.tensors["dead.loss.auxk_loss"])
    loss.backward()
    for key, gradient in oriented(stored.under("dead.grad_of.auxk_loss")).items():
        none = torch.zeros_like(run.p[key])
        close(none if run.p[key].grad is None else run.p[key].grad, gradient)


@pytest.mark.parametrize("name", TOP)
def test_fewer_positives_than_k(name):
    stored = rival(name)
    run = Run(stored)
    run.p["b_enc"] = stored.tensors["few.b_enc"].double()
    run.loss(stored.tensors["x"].double(), 0)
    assert (run.latents > 0).sum() < 4 * 16
    close(run.latents, stored.tensors["few.latents"])
    close(run.out, stored.tensors["few.out"])


@pytest.mark.parametrize("name", TRAINED)
def test_inference_after_training(name):
    """BatchTopK and Matryoshka by their threshold, TopK by its k, JumpReLU with a ReLU."""
    stored = rival(name)
    run = Run(stored)
    after = oriented(stored.under("after_20"))
    run.p = parameters(stored.under("after_20"), run.trainer)
    x = stored.tensors["x"].double()
    run.loss(x, 0)
    by_threshold = run.positive * (run.positive > after["threshold"]) if "k" in run.settings else run.latents.relu()
    latents = run.latents if run.trainer == "TopKTrainer" else by_threshold
    close(latents, stored.tensors["infer.latents"])
    close(run.decoded(latents), stored.tensors["infer.out"])
    if "infer.by_threshold" in stored.tensors:
        close(by_threshold, stored.tensors["infer.by_threshold"])


def geometric_median(points):
    """Weiszfeld's iteration from the mean, to a move under 1e-5."""
    guess = points.mean(0)
    while True:
        weights = 1 / (points - guess).norm(dim=1)
        new = (weights[:, None] * points).sum(0) / weights.sum()
        if (new - guess).norm() < 1e-5:
            return new
        guess = new


def test_initialisation():
    """Unit decoders and their transposes (0.1 for the ReLU ones), θ 0.001; the top-k family's b_dec is a median."""
    for name in TRAINED:
        stored = rival(name)
        if not stored.under("init"):
            continue  # as another file has it
        init, start = oriented(stored.under("init")), oriented(stored.under("start"))
        norm = 0.1 if stored.settings["trainer"] in RELU else 1.0
        close(init["W_dec"].norm(dim=1), torch.full((24,), norm), 1e-6)
        assert torch.equal(init["W_enc"], init["W_dec"].T)
        if "k" in stored.settings["settings"]:
            close(start["b_dec"], geometric_median(stored.tensors["x"].double()), 1e-5)
            assert init["threshold"] == -1
        elif "threshold" in init:
            close(init["threshold"], torch.full((24,), 0.001), 1e-8)
