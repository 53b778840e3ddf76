"""elutq: 2-4 bit large language models on ordinary CPUs.

Importing this package loads nothing heavy: the public names are resolved on first use.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elutq.runtime import LanguageModel as LanguageModel
    from elutq.runtime import PromptCache as PromptCache
    from elutq.runtime import load as load

try:
    __version__ = version("elutq")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["LanguageModel", "PromptCache", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "LanguageModel", "PromptCache"):
        from elutq import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
