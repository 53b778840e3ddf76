"""The exception tree. Every message names the thing at fault and says what to do next.

One class per kind of fault, so that callers can tell them apart without reading text; all of them derive from
:class:`ElutqError`, which the command line turns into one line on stderr and exit status 1.
"""


class ElutqError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        elsewhere: it happened in another process of the job, which gives the message to a person.
    """

    elsewhere = False


class InvalidArgumentError(ElutqError, ValueError):
    """An option or argument is outside what is supported."""


class ContextOverflowError(InvalidArgumentError):
    """A prompt has more tokens than the context."""


class QueueFullError(ElutqError):
    """The server has as many requests as it will hold.

    Attributes:
        retry_after: seconds after which there is likely to be room.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ShuttingDownError(ElutqError):
    """The server takes no more requests."""


class MissingDependencyError(ElutqError, ImportError):
    """An optional package that this operation needs is not installed."""


class UnsupportedArchitectureError(ElutqError):
    """The model's `model_type`, or an option in its config, is not one the engine runs."""


class ConfigError(ElutqError):
    """`config.json` is missing, is not JSON, or lacks or contradicts a required key."""


class TokenizerError(ElutqError):
    """The tokenizer files are missing or cannot be read."""


class CheckpointError(ElutqError):
    """Base of everything that can be wrong with a model folder."""


class MissingFileError(CheckpointError):
    """The folder, its weights, or a shard that the index names does not exist."""


class TruncatedFileError(CheckpointError):
    """A weight file is shorter than its header says."""


class HeaderError(CheckpointError):
    """A safetensors header or shard index is malformed or inconsistent."""


class MissingTensorError(CheckpointError):
    """A tensor that the config calls for is not in the folder."""


class UnexpectedTensorError(CheckpointError):
    """The folder holds a tensor that the config does not call for."""


class TensorDtypeError(CheckpointError):
    """A tensor's dtype is not the one required."""


class TensorShapeError(CheckpointError):
    """A tensor's shape is not the one required."""


class TensorValueError(CheckpointError):
    """A tensor holds NaN, infinity, or values beyond what the format can store."""


class UnsupportedVersionError(CheckpointError):
    """The folder was written in a format version this release does not read."""


class SingularHessianError(ElutqError, ValueError):
    """The Hessian of a layer's calibration inputs is zero, not finite, or not positive definite."""


class InsufficientMemoryError(ElutqError):
    """The work would need more memory than there is."""


class WorkerLostError(ElutqError):
    """Another process of the job ended, or cannot be reached."""


class OutputExistsError(ElutqError):
    """The output path exists and is not ours to replace."""


class ResumeMismatchError(ElutqError):
    """Partial output was made from another source or with other settings."""


class DiskSpaceError(ElutqError):
    """The target file system has too little room."""
