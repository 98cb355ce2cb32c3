"""Cross-Linked Unified Embedding of single cells measured in different, incomplete modalities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clue_dist.api import Run, fit, load

__version__ = "0.1.0"
__all__ = ["Run", "fit", "load"]


def __getattr__(name: str) -> Any:
    # Commands check a config before torch is imported, which takes seconds: it waits until asked.
    if name in __all__:
        from clue_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
