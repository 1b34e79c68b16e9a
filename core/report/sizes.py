"""Sizes as people read them."""


def readable(num_bytes: float) -> str:
    """Decimal, as the Hub shows them: "13.76 GB", "16.0 MB"."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
