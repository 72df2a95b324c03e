"""What an operator must be for a power, a logarithm or a damping."""

from __future__ import annotations

from fisher_forget.errors import CurvatureError


def checked_damping(tau: float) -> float:
    """The damping itself.

    Raises:
        CurvatureError: If it is negative or not a number.
    """
    if not tau >= 0:
        raise CurvatureError(f"damping {tau}", "tau >= 0", "Pass a non-negative damping.")
    return tau


def check_undamped(a: float, b: float) -> None:
    """Refuse to add damped curvatures: the sum would hold the damping twice.

    Raises:
        CurvatureError: If either damping is not 0.
    """
    if a or b:
        raise CurvatureError(
            f"dampings {(a, b)}", "undamped curvatures", "Add first, damp afterwards."
        )


def needs_definite(p: float) -> bool:
    """Whether x^p makes trouble for some x <= 0."""
    return p < 0 or p != int(p)


def check_definite(smallest: float, what: str, *, singular: bool = False) -> None:
    """Refuse an operation on an operator whose smallest eigenvalue is too small for it.

    Args:
        smallest: Smallest eigenvalue, damping included.
        what: The operation, for the message.
        singular: Refuse 0, too.

    Raises:
        CurvatureError: With a damping that is enough.
    """
    if smallest < 0:
        raise CurvatureError(
            f"{what} of an indefinite curvature, smallest eigenvalue {smallest:.4g}",
            "a positive definite one: away from a minimum a Hessian also curves downwards",
            f"Damp it first: curvature.damped(tau) with tau >= {-1.01 * smallest:.4g}; "
            "or use kind='exact'.",
        )
    if singular and smallest == 0:
        got = f"{what} of a singular curvature"
        fix = "Damp it first: curvature.damped(tau) with tau > 0."
        raise CurvatureError(got, "strictly positive eigenvalues", fix)
