"""Independent float64 oracles: dense GGN, Fisher and Hessian by brute force, without the package's
curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params, flatten, unflatten


def start(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ggn(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, *, empirical: bool = False
) -> Tensor:
    """(1 / scored positions) sum_n J_n^T H_n J_n [d, d], sample by sample; r_n r_n^T for H_n if
    empirical."""
    like = start(model)
    flat = flatten(like)
    total = flat.new_zeros(len(flat), len(flat))
    for n in range(len(x)):

        def outputs(w: Tensor, n: int = n) -> Tensor:
            return torch.func.functional_call(model, unflatten(w, like), (x[n : n + 1],))[0]

        f = outputs(flat).detach()
        jacobian = torch.autograd.functional.jacobian(lambda w: outputs(w).reshape(-1), flat)

        def loss(v: Tensor, n: int = n, f: Tensor = f) -> Tensor:
            return likelihood.losses(v.reshape(f.shape)[None], y[n : n + 1]).sum()

        if empirical:
            v = f.reshape(-1).requires_grad_()
            (r,) = torch.autograd.grad(loss(v), v)
            middle = torch.outer(r, r)
        else:
            middle = torch.autograd.functional.hessian(loss, f.reshape(-1))
        total += jacobian.T @ middle @ jacobian
    return total / float(likelihood.counts(y).sum())


def from_columns(
    model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, columns: Tensor
) -> Tensor:
    """(1 / scored positions) sum_nk (J_n^T s_nk)(J_n^T s_nk)^T [d, d] for columns [K, N, ...]."""
    like = start(model)
    flat = flatten(like)
    total = flat.new_zeros(len(flat), len(flat))
    for n in range(len(x)):

        def outputs(w: Tensor, n: int = n) -> Tensor:
            return torch.func.functional_call(model, unflatten(w, like), (x[n : n + 1],)).reshape(
                -1
            )

        pulled = columns[:, n].reshape(len(columns), -1) @ torch.autograd.functional.jacobian(
            outputs, flat
        )
        total += pulled.T @ pulled
    return total / float(likelihood.counts(y).sum())


def hessian(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """Hessian of the mean loss [d, d]."""
    like = start(model)

    def loss(w: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, unflatten(w, like), (x,))
        return likelihood.losses(outputs, y).sum() / float(likelihood.counts(y).sum())

    return torch.autograd.functional.hessian(loss, flatten(like))


def power(matrix: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).pow(p)) @ vectors.T
