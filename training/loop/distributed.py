"""The processes of a training run and their devices: torchrun starts them, NCCL or gloo connects them."""

import torch
from torch import Tensor

from personatlas.persona.distributed import PATIENCE, World
from personatlas.persona.errors import UserError


def init_distributed(world: World, device: str | None = None) -> torch.device:
    """This process's device, its own GPU if there is one; several processes become one group.

    Raises `UserError` for another device than cuda or cpu, and where a host has fewer GPUs than processes.
    """
    if device not in (None, "cuda", "cpu"):
        raise UserError(f"--device {device} is not cuda or cpu; CUDA_VISIBLE_DEVICES says which GPU is used")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no GPU that torch can use; try --device cpu")
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this host has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; give torchrun --nproc-per-node as many"
            )
        chosen = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(chosen)
    if world.size > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            if chosen.type == "cuda":
                dist.init_process_group("cpu:gloo,cuda:nccl", device_id=chosen)
            else:
                dist.init_process_group("gloo", timeout=PATIENCE)
    return chosen


def all_sum(x: Tensor, world: World) -> Tensor:
    """x, in place the sum of all ranks' x."""
    if world.size > 1:
        import torch.distributed as dist

        dist.all_reduce(x)
    return x


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
