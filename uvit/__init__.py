"""U-ViT, a vision transformer backbone for diffusion models with long skip connections."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uvit.config import Config, UNetConfig, UViTConfig
    from uvit.weights.build import UNet, UViT, build_network

__all__ = ["Config", "UNet", "UNetConfig", "UViT", "UViTConfig", "build_network"]
__version__ = "0.2.0"

_MODULES = dict.fromkeys(("Config", "UNetConfig", "UViTConfig"), "config")
_MODULES |= dict.fromkeys(("UNet", "UViT", "build_network"), "weights.build")


def __getattr__(name: str) -> Any:
    """Imports a name on first use, so that importing one subpackage does not load another."""
    if name == "config":
        return import_module(f"{__name__}.config")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__", "config"]
