"""Which processor a run is on."""

from dataclasses import replace

import torch

from personaxis.training.dial import CHIPS, Chip


def chip_of(device: torch.device) -> Chip:
    """The known processor that a device is; an unknown GPU counts as the slowest known one, with its own memory."""
    if device.type != "cuda":
        return CHIPS["cpu"]
    name = torch.cuda.get_device_name(device)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    for key, chip in CHIPS.items():
        if key in name.lower():
            return replace(chip, memory=memory)
    return replace(CHIPS["4090"], name=name, memory=memory)
