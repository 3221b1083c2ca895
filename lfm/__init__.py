"""A training system for LFM-3B and its smaller families: `lfm --help`, or docs/ of the project."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm.errors import UserError
    from lfm.library import (
        LAERC,
        LSTM,
        LAERCConfig,
        LFM3BConfig,
        LFM3BForCausalLM,
        LiquidLM,
        LiquidLMConfig,
        LiquidNet,
        LiquidNetConfig,
        LiquidNNConfig,
        LSTMConfig,
        MiniLiquidGPT,
        Transformer,
        TransformerConfig,
        load,
    )

__version__ = "0.1.0"

__all__ = [
    "LAERC",
    "LSTM",
    "LAERCConfig",
    "LFM3BConfig",
    "LFM3BForCausalLM",
    "LSTMConfig",
    "LiquidLM",
    "LiquidLMConfig",
    "LiquidNNConfig",
    "LiquidNet",
    "LiquidNetConfig",
    "MiniLiquidGPT",
    "Transformer",
    "TransformerConfig",
    "UserError",
    "load",
]


if not TYPE_CHECKING:  # which knows the names without it, and that there are no others

    def __getattr__(name: str) -> Any:
        """Import what is asked for: torch, which all but the error needs, takes seconds."""
        import importlib

        if name not in __all__:
            import difflib

            near = difflib.get_close_matches(name, __all__, n=1)
            there = f"did you mean {near[0]}?" if near else f"there are {', '.join(__all__)}"
            raise AttributeError(f"module 'lfm' has no attribute {name!r}; {there}")
        value = getattr(importlib.import_module("lfm.errors" if name == "UserError" else "lfm.library"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
