"""The paper's hypergradient in plain torch, as Algorithms 2 and 3 write it: what all of hvp_engine computes, faster.

    python examples/minimal.py

Losses L_T(w, lambda) and L_V(w, lambda), H = d2L_T/dw dw^T. At weights that minimize the training loss,

    dL_V*/dlambda = dL_V/dlambda - (d2L_T/dlambda dw^T) H^-1 dL_V/dw.

No matrix is formed: H v is the gradient of (dL_T/dw)^T v, and H^-1 v is a series of such products.
"""

import torch
from torch.autograd import grad


def approx_inverse_hvp(v, f, w, iterations, alpha):
    """Algorithm 3: alpha * sum_{j=0..iterations} (I - alpha H)^j v, for f = dL_T/dw with its graph.

    It tends to H^-1 v if H is positive definite and 0 < alpha < 2 / lambda_max(H). The paper leaves out the last alpha.
    """
    p = v
    for _ in range(iterations):
        products = grad(f, w, grad_outputs=v, retain_graph=True)  # H v
        v = [v_i - alpha * product for v_i, product in zip(v, products, strict=True)]
        p = [p_i + v_i for p_i, v_i in zip(p, v, strict=True)]
    return [alpha * p_i for p_i in p]


def hypergradient(train_loss, val_loss, w, hyper, iterations, alpha):
    """Algorithm 2: dL_V*/dlambda, for scalar losses with their graphs and lists of the tensors w and lambda."""
    v1 = grad(val_loss, w, retain_graph=True)
    f = grad(train_loss, w, create_graph=True)
    v2 = approx_inverse_hvp(v1, f, w, iterations, alpha)
    v3 = grad(f, hyper, grad_outputs=v2)  # (d2L_T/dlambda dw^T) v2
    direct = grad(val_loss, hyper, allow_unused=True, materialize_grads=True)
    return [d - v for d, v in zip(direct, v3, strict=True)]


def main():
    """Linear regression with a decay for each weight, where a few lines of algebra give the exact hypergradient."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    (x, x_val), slope = torch.randn(2, 30, 5), torch.randn(5)
    y, y_val = x @ slope + torch.randn(30), x_val @ slope + torch.randn(30)
    log_decay = torch.full((5,), -1.0, requires_grad=True)
    decay = log_decay.detach().exp()
    hessian = x.T @ x / 30 + decay.diag()
    w = torch.linalg.solve(hessian, x.T @ y / 30).requires_grad_()  # the minimum of the training loss
    exact = -decay * w.detach() * torch.linalg.solve(hessian, x_val.T @ (x_val @ w.detach() - y_val) / 30)

    print(f"{'products':>8}{'error':>10}")
    for iterations in (0, 1, 5, 20, 100):
        train_loss = ((x @ w - y) ** 2).mean() / 2 + (log_decay.exp() * w**2).sum() / 2
        val_loss = ((x_val @ w - y_val) ** 2).mean() / 2
        (found,) = hypergradient(train_loss, val_loss, [w], [log_decay], iterations, alpha=0.5)
        print(f"{iterations:>8}{float((found - exact).norm() / exact.norm()):>10.1e}")


if __name__ == "__main__":
    main()
