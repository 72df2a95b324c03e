"""Numbers as they are shown to people: in tables, on pages and in a terminal."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float | None) -> str:
    """Three significant digits from 1 on, two below.

    Example:
        >>> [number(v) for v in (12.345, 0.5, 0.0001234, 20000.0, 0.0, None)]
        ['12.3', '0.50', '1.2e-04', '2.0e+04', '0', '–']
    """
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return f"{value:.{_decimals(value)}f}" if _plain(value) else f"{value:.1e}"


def plus_minus(mean: float, std: float) -> str:
    """Mean ± standard deviation, rounded alike.

    Example:
        >>> plus_minus(1.2345, 0.1), plus_minus(12.3, 0.04), plus_minus(1.2, float("nan"))
        ('1.23 ± 0.10', '12.30 ± 0.04', '1.20')
    """
    if not (math.isfinite(mean) and math.isfinite(std)):
        return number(mean)
    if not _plain(mean):
        return f"{number(mean)} ± {std:.0e}"
    decimals = _decimals(mean) if mean else 2
    if std > 1e-9 * abs(mean):  # one digit of a spread that is not rounding error must survive
        decimals = min(max(decimals, -math.floor(math.log10(std))), decimals + 2)
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def percent(share: float) -> str:
    """A share in whole %, without the unit; never rounded up to a whole that was not reached.

    Example:
        >>> percent(0.943), percent(0.9982), percent(0.99999), percent(-0.4)
        ('94', '99', '> 99.9', '-40')
    """
    if 0.999 < share < 1:
        return "> 99.9"
    return str(math.floor(100 * share) if 0.99 <= share < 1 else round(100 * share))


def share(value: float, low: float, high: float) -> str:
    """A share and its interval in %, "–" where one of them is missing.

    Example:
        >>> share(0.9982, 0.97, 1.004), share(*3 * [float("nan")])
        ('99 % (97 to 100)', '–')
    """
    if not all(map(math.isfinite, (value, low, high))):
        return MISSING
    if low > 0.999 and high < 1:  # all three read alike
        return f"{percent(value)} %"
    return f"{percent(value)} % ({percent(low)} to {percent(high)})"


def _plain(value: float) -> bool:
    return value == 0 or 1e-3 <= abs(value) < 1e4


def _decimals(value: float) -> int:
    power = math.floor(math.log10(abs(value)))
    return max(0, (2 if power >= 0 else 1) - power)
