"""Logistic regression of a class against the others: the pieces that removal and attacks share."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_forget.errors import DataError

MOST = 10_000  # columns: a Hessian of them has 800 MB


def pulls(weights: Tensor, x: Tensor, signs: Tensor) -> Tensor:
    """-sigma(-y w^T x) y, by which each row is multiplied in the gradient of its loss.

    Args:
        weights: [K, d].
        x: Rows [N, d].
        signs: y [K, N].

    Returns:
        [K, N].
    """
    return -torch.sigmoid(-signs * (weights @ x.T)) * signs


def hessian_factor(x: Tensor, weights: Tensor, regularisation: float) -> Tensor:
    """Cholesky factor [d, d] of sum_i sigma(z_i) sigma(-z_i) x_i x_i^T + lambda N I, z = x w.

    Args:
        x: Rows [N, d].
        weights: w [d].
        regularisation: lambda.
    """
    z = x @ weights
    hessian = x.T @ (x * (torch.sigmoid(z) * torch.sigmoid(-z))[:, None])
    hessian.diagonal().add_(regularisation * len(x))
    factor: Tensor = torch.linalg.cholesky(hessian)
    return factor


def signs_of(y: Tensor, classes: Tensor) -> Tensor:
    """1 for each class's own rows, -1 for others [K, N]; of two classes the second alone."""
    which = classes[1:] if len(classes) == 2 else classes
    return torch.where(y[None] == which[:, None], 1.0, -1.0).double()


def checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features in double precision, classes of the rows and the classes there are.

    Raises:
        DataError: If they are not such tensors, or there is one class only.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != 2 or len(x) != len(y):
        shapes = [tuple(getattr(t, "shape", ())) for t in (x, y)]
        got, expected = f"x and y of the shapes {shapes}", "tensors [N, d] and [N]"
        raise DataError(got, expected, "Pass a row a sample, and a class a row.")
    if y.ndim != 1 or y.is_floating_point():
        got = f"y of shape {tuple(y.shape)} and dtype {y.dtype}"
        raise DataError(got, "whole numbers [N]", "Pass the class of each row.")
    if x.shape[1] > MOST:
        got = f"{x.shape[1]} features"
        raise DataError(got, f"at most {MOST:,}: the Hessian is held", "Reduce them first.")
    if not bool(torch.isfinite(x).all()):
        raise DataError("features that are not finite", "numbers", "Remove or mend such rows.")
    classes = y.unique()
    if len(classes) < 2:
        raise DataError(f"{len(classes)} class", "two or more", "Pass samples of all classes.")
    return x.detach().cpu().double(), y.detach().cpu().long(), classes.cpu()
