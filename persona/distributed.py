"""Several processes on one run: `torchrun --nproc-per-node N -m personatlas axis MODEL ...`.

Work is cut into chunks whose content depends on the plan alone; rank r takes the chunks r, r + world, ... and
writes files of its own, which rank 0 puts together after a barrier. So N processes give the very result that
one gives. The run folder must be on a file system that all of them see; nothing but barriers travels over the
network.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

from personatlas.persona.errors import UserError

PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `world`, `local` on this host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def owns(self, chunk: int) -> bool:
        """Whether this process does that chunk."""
        return chunk % self.size == self.rank

    def barrier(self) -> None:
        """Wait for all processes (at most a day: a rank may have one long chunk more than another). Raises
        `UserError` where another one has ended.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            if dist.get_backend() == "gloo":
                dist.barrier()
                return
            # NCCL's own gives up after ten minutes, and does not see that a process has ended
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            dist.barrier(group)
            dist.destroy_process_group(group)
        except RuntimeError as error:  # gloo says in many words that a connection was closed
            raise UserError(
                f"process {self.rank} of {self.size}: another process has ended; if it says nothing, it was killed (for memory?)"
            ) from error

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()


def get_world() -> World:
    """The place that torchrun gave this process; a single process without it."""
    get = os.environ.get
    return World(int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0")))
