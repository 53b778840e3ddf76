"""Model folders on disk: Hugging Face folders as they come, and HLQ folders (`docs/format.md`)."""

from elutq.checkpoint.reader import Checkpoint
from elutq.checkpoint.safetensors import TensorInfo

__all__ = ["Checkpoint", "TensorInfo"]
