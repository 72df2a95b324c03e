"""Independent float64 oracles: dense GGN and empirical Fisher by brute force, without the package's curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fisher_forget.likelihood import Likelihood
from fisher_forget.params import Params, flatten, unflatten


def start(model: nn.Module) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ggn(model: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, *, empirical: bool = False) -> Tensor:
    """(1 / scored positions) sum_n J_n^T H_n J_n [d, d], sample by sample; r_n r_n^T for H_n if empirical."""
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


def power(matrix: Tensor, p: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).pow(p)) @ vectors.T
