"""Stands in for torchvision, of which PyPI has no build that fits this CPU torch. SGLang and Transformers import
it for images; nothing here uses it."""

import sys
from unittest.mock import MagicMock

for _name in ("io", "transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    sys.modules[f"{__name__}.{_name}"] = MagicMock()

__version__ = "0.28.0"
