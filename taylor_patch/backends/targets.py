"""What backends that aim at an error share: how far below it they stay, and how long a finding holds."""

MARGIN = 0.75
"""The error of a head may be above that of its 64 rows; with this margin nine heads in ten meet the target (docs/accuracy.md)."""


def sigma_bin(sigma: float) -> int:
    """Sixteen bins over all noise levels: sigma / (1 + sigma) in sixteenths, eight of them for models whose sigma ends at 1."""
    return int(16 * sigma / (1 + sigma))
