"""Model folders on disk: Hugging Face folders as they come, and HLQ folders (`docs/format.md`)."""

from elutq.checkpoint.contents import Part, hlq_tensors, model_parts
from elutq.checkpoint.folder import HUB_ID, read_generation_config, side_files
from elutq.checkpoint.reader import Checkpoint
from elutq.checkpoint.safetensors import TensorInfo, TensorSpec
from elutq.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    CheckpointWriter,
    check_replaceable,
    weight_bytes,
    write_atomically,
)

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "HUB_ID",
    "Checkpoint",
    "CheckpointWriter",
    "Part",
    "TensorInfo",
    "TensorSpec",
    "check_replaceable",
    "hlq_tensors",
    "model_parts",
    "read_generation_config",
    "side_files",
    "weight_bytes",
    "write_atomically",
]
