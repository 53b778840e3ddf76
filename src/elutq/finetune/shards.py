"""Tensors that FSDP may have spread over the processes."""

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of it where it is not sharded."""
    shard: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full
