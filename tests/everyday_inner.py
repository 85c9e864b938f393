"""Losses with derivatives or distributions inside, and whole steps of learning."""

from __future__ import annotations

import torch
from everyday_losses import CLASSES, ROWS, Tensors, hidden, logits, loss, one_hot
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F


def network(w: Tensors, points: Tensor) -> Tensor:
    return torch.tanh(points @ w["a"] + w["b"]) @ w["c"]


@loss("physics-informed, heat equation")
def _heat(w: Tensors, x: Tensors) -> Tensor:
    points = x["x"].clone().requires_grad_(True)
    u = network(w, points)[:, :1]
    du = torch.autograd.grad(u, points, torch.ones_like(u), create_graph=True)[0]
    d2u = torch.autograd.grad(du[:, 0], points, torch.ones_like(du[:, 0]), create_graph=True)[0]
    return (du[:, 1] - 0.1 * d2u[:, 0]).pow(2).mean()


@loss("physics-informed, sum().backward style")
def _poisson(w: Tensors, x: Tensors) -> Tensor:
    points = x["x"].detach().requires_grad_()
    (du,) = torch.autograd.grad(network(w, points)[:, 0].sum(), points, create_graph=True)
    total = 0
    for axis in range(2):
        total = total + torch.autograd.grad(du[:, axis].sum(), points, create_graph=True)[0][:, axis]
    return ((total - 1) ** 2).mean()


@loss("gradient penalty")
def _gradient_penalty(w: Tensors, x: Tensors) -> Tensor:
    between = torch.lerp(x["x"], x["x"].flip(0), torch.rand(ROWS, 1)).requires_grad_(True)
    slopes = torch.autograd.grad(network(w, between).sum(), between, create_graph=True, retain_graph=True)[0]
    return ((slopes.norm(2, dim=1) - 1) ** 2).mean()


@loss("score matching")
def _score_matching(w: Tensors, x: Tensors) -> Tensor:
    points = x["x"].detach().clone().requires_grad_()
    energy = network(w, points).square().sum()
    (score,) = torch.autograd.grad(-energy, points, create_graph=True)
    v = torch.randn_like(points).sign()
    (hv,) = torch.autograd.grad((score * v).sum(), points, create_graph=True)
    return ((hv * v).sum(-1) + 0.5 * (score**2).sum(-1)).mean()


@loss("MAML")
def _maml(w: Tensors, x: Tensors) -> Tensor:
    fast = {name: w[name] for name in ("a", "b", "c")}
    inner = F.cross_entropy(network(fast, x["x"][:4]), x["c"][:4])
    grads = torch.autograd.grad(inner, list(fast.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
    return F.cross_entropy(network(fast, x["x"][4:]), x["c"][4:])


@loss("MAML by torch.func")
def _maml_functional(w: Tensors, x: Tensors) -> Tensor:
    fast = {name: w[name] for name in ("a", "b", "c")}

    def inner(p: Tensors) -> Tensor:
        return F.cross_entropy(network(p, x["x"][:4]), x["c"][:4])

    for _ in range(2):
        fast = {name: fast[name] - 0.1 * g for name, g in grad(inner)(fast).items()}
    return F.cross_entropy(network(fast, x["x"][4:]), x["c"][4:])


@loss("prototypes")
def _prototypes(w: Tensors, x: Tensors) -> Tensor:
    z = hidden(w, x)
    centers = torch.stack([z[x["c"] == k].mean(0) for k in range(CLASSES)])
    return F.cross_entropy(-((z[:, None] - centers) ** 2).sum(-1), x["c"])


@loss("prototypes by cdist")
def _prototypes_cdist(w: Tensors, x: Tensors) -> Tensor:
    z, members = hidden(w, x), one_hot(x)
    centers = members.T @ z / members.sum(0)[:, None]
    return F.cross_entropy(-(torch.cdist(z, centers) ** 2), x["c"])


@loss("Jacobian norm by jacrev")
def _jacobian(w: Tensors, x: Tensors) -> Tensor:
    return vmap(jacrev(lambda row: network(w, row)))(x["x"]).square().sum((1, 2)).mean()


@loss("Jacobian norm by jacfwd")
def _jacobian_forward(w: Tensors, x: Tensors) -> Tensor:
    return vmap(jacfwd(lambda row: network(w, row)))(x["x"]).square().mean()


@loss("Laplacian by hessian")
def _laplacian(w: Tensors, x: Tensors) -> Tensor:
    return vmap(lambda row: torch.trace(hessian(lambda r: network(w, r)[0])(row)))(x["x"]).square().mean()


@loss("jvp inside")
def _jvp(w: Tensors, x: Tensors) -> Tensor:
    return jvp(lambda points: network(w, points), (x["x"],), (torch.ones_like(x["x"]),))[1].square().mean()


@loss("vjp inside")
def _vjp(w: Tensors, x: Tensors) -> Tensor:
    value, pull = vjp(lambda points: network(w, points), x["x"])
    return pull(torch.ones_like(value))[0].square().mean()


@loss("per-sample gradients")
def _per_sample(w: Tensors, x: Tensors) -> Tensor:
    def one(a: Tensor, row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(network({**w, "a": a}, row), label)

    return vmap(grad(one), (None, 0, 0))(w["a"], x["x"], x["c"]).square().sum((1, 2)).mean()


@loss("autograd.functional.jvp")
def _autograd_functional(w: Tensors, x: Tensors) -> Tensor:
    function = torch.autograd.functional.jvp
    return function(lambda p: network(w, p), x["x"], torch.ones_like(x["x"]), create_graph=True)[1].square().mean()


@loss("sharpness-aware")
def _sharpness_aware(w: Tensors, x: Tensors) -> Tensor:
    (g,) = torch.autograd.grad(F.cross_entropy(logits(w, x), x["c"]), w["a"], create_graph=True)
    return F.cross_entropy(logits({**w, "a": w["a"] + 0.05 * g / (g.norm() + 1e-12)}, x), x["c"])


@loss("policy gradient, distributions with their checks")
def _policy_gradient(w: Tensors, x: Tensors) -> Tensor:
    policy = torch.distributions.Categorical(logits=logits(w, x))
    return -(policy.log_prob(x["c"]) * x["y"]).mean() - 0.01 * policy.entropy().mean()


@loss("PPO")
def _ppo(w: Tensors, x: Tensors) -> Tensor:
    new = logits(w, x).log_softmax(-1).gather(1, x["c"][:, None])[:, 0]
    ratio = torch.exp(new - x["t"].log_softmax(-1).gather(1, x["c"][:, None])[:, 0])
    return -torch.min(ratio * x["y"], ratio.clamp(0.8, 1.2) * x["y"]).mean()


@loss("DPO")
def _dpo(w: Tensors, x: Tensors) -> Tensor:
    log_p = logits(w, x).log_softmax(-1)[torch.arange(ROWS), x["c"]] - x["t"].log_softmax(-1)[:, 0]
    return -F.logsigmoid(0.1 * (log_p[:4] - log_p[4:])).mean()


@loss("Q-learning")
def _q_learning(w: Tensors, x: Tensors) -> Tensor:
    q = logits(w, x).gather(1, x["c"].unsqueeze(1)).squeeze(1)
    with torch.no_grad():
        target = x["y"] + 0.99 * logits(w, x).max(1)[0]
    return F.smooth_l1_loss(q, target)


@loss("Normal with its checks")
def _normal(w: Tensors, x: Tensors) -> Tensor:
    h = logits(w, x)
    return -torch.distributions.Normal(h[:, 0], F.softplus(h[:, 1])).log_prob(x["y"]).mean()


@loss("rsample and kl_divergence")
def _rsample(w: Tensors, x: Tensors) -> Tensor:
    h = logits(w, x)
    q = torch.distributions.Normal(h[:, 0], h[:, 1].exp())
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    return (q.rsample() - x["y"]).square().mean() + torch.distributions.kl_divergence(q, prior).mean()


@loss("MultivariateNormal")
def _multivariate(w: Tensors, x: Tensors) -> Tensor:
    covariance = torch.eye(6) + w["s"] @ w["s"].T
    return -torch.distributions.MultivariateNormal(torch.zeros(6), covariance).log_prob(x["x"]).mean()


@loss("Beta")
def _beta(w: Tensors, x: Tensors) -> Tensor:
    h = F.softplus(logits(w, x)) + 0.5
    return -torch.distributions.Beta(h[:, 0], h[:, 1]).log_prob(x["y"].sigmoid()).mean()


@loss("Gaussian process")
def _gaussian_process(w: Tensors, x: Tensors) -> Tensor:
    z = hidden(w, x)
    kernel = torch.exp(-0.5 * ((z[:, None] - z) ** 2).sum(-1)) + 0.1 * torch.eye(ROWS)
    root = torch.linalg.cholesky(kernel)
    return 0.5 * x["y"] @ torch.cholesky_solve(x["y"][:, None], root)[:, 0] + root.diagonal().log().sum()


@loss("CRF")
def _crf(w: Tensors, x: Tensors) -> Tensor:
    scores, transitions = logits(w, x), w["s"][:3, :3]
    alpha = scores[0]
    for t in range(1, ROWS):
        alpha = torch.logsumexp(alpha[:, None] + transitions, 0) + scores[t]
    path = scores[torch.arange(ROWS), x["c"]].sum() + transitions[x["c"][:-1], x["c"][1:]].sum()
    return alpha.logsumexp(0) - path


@loss("Sinkhorn")
def _sinkhorn(w: Tensors, x: Tensors) -> Tensor:
    cost = ((hidden(w, x)[:, None] - w["e"]) ** 2).sum(-1)
    f, g = torch.zeros(ROWS), torch.zeros(9)
    for _ in range(3):
        f = -torch.logsumexp(g - cost, 1)
        g = -torch.logsumexp(f[:, None] - cost, 0)
    return (torch.exp(f[:, None] + g - cost) * cost).sum()


@loss("MMD")
def _mmd(w: Tensors, x: Tensors) -> Tensor:
    a, b = hidden(w, x).chunk(2)

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return torch.exp(-(p[:, None] - q[None]).pow(2).sum(-1) / 2).mean()

    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


@loss("neural ODE by RK4")
def _ode(w: Tensors, x: Tensors) -> Tensor:
    z, step = x["x"], 0.2
    for _ in range(3):
        k1 = torch.tanh(z @ w["s"])
        k2 = torch.tanh((z + step / 2 * k1) @ w["s"])
        k3 = torch.tanh((z + step / 2 * k2) @ w["s"])
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + torch.tanh((z + step * k3) @ w["s"]))
    return z.square().mean()


@loss("fixed point of a loop until it settles")
def _until_settled(w: Tensors, x: Tensors) -> Tensor:
    z = torch.zeros_like(x["x"])
    for _ in range(30):
        before, z = z, torch.tanh(0.2 * z @ w["s"] + x["x"])
        if (z - before).norm() < 1e-3:
            break
    return z.square().mean()


@loss("data weights by a sigmoid of the loss")
def _reweighted(w: Tensors, x: Tensors) -> Tensor:
    losses = F.cross_entropy(logits(w, x), x["c"], reduction="none")
    weights = torch.sigmoid(losses.detach() * w["b"][0])
    return (weights / weights.sum() * losses).sum()


@loss("a module made inside")
def _module_inside(w: Tensors, x: Tensors) -> Tensor:
    module = torch.nn.Linear(6, 5)
    return functional_call(module, {"weight": w["a"].T, "bias": w["b"]}, (x["x"],)).square().mean()


@loss("nn.CrossEntropyLoss made inside")
def _criterion(w: Tensors, x: Tensors) -> Tensor:
    return torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits(w, x), x["c"])


@loss("custom autograd.Function")
def _custom(w: Tensors, x: Tensors) -> Tensor:
    return _Square.apply(logits(w, x)).mean()


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g
