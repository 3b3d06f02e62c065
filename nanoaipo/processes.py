"""Who this process is among those of torchrun, and which device is its own.
"""
import os

DTYPES = ("bfloat16", "float32")
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device():
    """This process's GPU, chosen by LOCAL_RANK, else the CPU."""
    import torch
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
