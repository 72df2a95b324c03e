"""The package's exceptions: each says what was got, what was expected, and what to do."""

from __future__ import annotations


class FisherForgetError(Exception):
    """Base of every exception this package raises on purpose.

    Args:
        got: What was found, with the offending value or shape.
        expected: What would have been accepted.
        fix: One sentence that tells the user what to do.
    """

    def __init__(self, got: str, expected: str, fix: str) -> None:
        self.got, self.expected, self.fix = got, expected, fix
        super().__init__(f"Got {got}; expected {expected}. {fix}")

    def __reduce__(self) -> tuple[type[FisherForgetError], tuple[str, str, str]]:
        return type(self), (
            self.got,
            self.expected,
            self.fix,
        )  # so that worker processes can raise it


class SplitError(FisherForgetError, ValueError):
    """`forget_idx` or the retain loader does not say who is retained and who is forgotten."""


class DataError(FisherForgetError, ValueError):
    """A batch, a target or a data folder is not what the likelihood or the reader needs."""


class ModelError(FisherForgetError, ValueError):
    """The model cannot be scrubbed as it is: mode, dtype, weights, parameters or forward."""


class CurvatureError(FisherForgetError, ValueError):
    """The curvature asked for is not supported, does not fit memory, or was misused."""


class NumericalError(FisherForgetError, ArithmeticError):
    """A computation left the finite numbers, or no step stayed within its budget."""


class ConfigError(FisherForgetError, ValueError):
    """A configuration holds an unknown key, a wrong type or a value out of range."""


class StorageError(FisherForgetError, OSError):
    """A folder cannot be written, or a stored file is damaged or belongs to something else."""


class FisherForgetWarning(UserWarning):
    """Something is legal but will probably surprise: read it once."""
