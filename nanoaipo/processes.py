"""The processes of a run: which one this is, its device, how they start together and end."""

import contextlib
import ctypes
import datetime
import functools
import json
import os
import resource
import signal
import sys

from nanoaipo.errors import InputError
from nanoaipo.locks import release_locks

DTYPES = ("bfloat16", "float32")


def number_of(name, default):
    """The whole number in an environment variable, or None where it holds something else."""
    try:
        return int(os.environ.get(name, default))
    except ValueError:  # check_rank tells
        return None


# torchrun sets both; without it a script is one process
RANK = number_of("RANK", 0)
WORLD_SIZE = number_of("WORLD_SIZE", 1)


def pick_device():
    """This process's GPU, chosen by LOCAL_RANK, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)

    # On H100 and later cuDNN is the first choice of scaled_dot_product_attention. It plans anew for
    # every shape, and each step of sampling is one; wrong values were reported (pytorch #193893).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def print0(line):
    """Print a line from the first process only."""
    if RANK == 0:
        print(line, flush=True)


def end_with_launcher():
    """Ask Linux to end this process when torchrun or iterate.sh, which started it, is killed.

    It would go on without them, and the same command, run again, would find its output locked.
    """
    is_stage = os.environ.get("ITERATE_PID") == str(os.getppid())
    if is_stage or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()


def end_with_parent():
    """Ask Linux to end this process when the one that started it ends; elsewhere do nothing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # of prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def keep_freed_memory():
    """Ask glibc to keep the memory of large tensors for the next ones; elsewhere do nothing.

    By default it returns that memory to the system, and fresh pages cost a fifth of training time.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # names and numbers of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 2**30)
        libc.mallopt(m_mmap_threshold, 2**30)


def check_rank():
    """Raise InputError unless the environment says which process of how many this is."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if number_of(name, 0) is None:
            raise InputError(
                f"{name}='{os.environ[name]}': no whole number; unset it, or start with torchrun"
            )
    if not 0 <= RANK < WORLD_SIZE:
        raise InputError(
            f"RANK={RANK}, WORLD_SIZE={WORLD_SIZE}: unset both, or start with torchrun"
        )


def check_environment():
    """Raise InputError for variables that torchrun would not set, such as a cluster's own."""
    check_rank()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if WORLD_SIZE > 1 and name not in os.environ:
            raise InputError(
                f"WORLD_SIZE={WORLD_SIZE}, and {name} is not set: start with torchrun, "
                "or unset RANK and WORLD_SIZE for one process"
            )


def spans_nodes():
    """Whether torchrun has started processes of this stage on other nodes, too."""
    return WORLD_SIZE > number_of("LOCAL_WORLD_SIZE", WORLD_SIZE)


@functools.cache
def torchrun_store():
    """The store in which torchrun lets the processes of this stage find each other."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(hours=2)))
    return store


def first_process_says(key, value):
    """The value that the first process of a stage has under this key, in all of its processes.

    It has to be one that JSON can hold, and what the others give does not count. No process group
    is needed: generate.py and rank.py have none.
    """
    if RANK == 0:
        torchrun_store().set(key, json.dumps(value))
    return json.loads(torchrun_store().get(key))


def start_processes(device, shard_size=0):
    """Connect the processes of this run and return the mesh over which FSDP shards.

    shard_size: processes that share one copy of the weights; 0: all. With it the mesh has two
    dimensions, (replicate, shard). Raises InputError if the environment does not say where the
    processes meet.
    """
    import torch.distributed as dist

    check_environment()
    if device.type == "cpu":
        keep_freed_memory()
        backend = "gloo"
        device_id = None
    else:
        backend = "nccl"
        device_id = device
    timeout = datetime.timedelta(hours=2)  # the others wait while rank 0 writes a large model

    # one process alone, whatever set RANK, opens no port
    alone = {}
    if WORLD_SIZE == 1:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timeout, device_id=device_id, **alone)

    if shard_size:
        shape = (WORLD_SIZE // shard_size, shard_size)
        return dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return dist.init_device_mesh(device.type, (WORLD_SIZE,), mesh_dim_names=("shard",))


def peak_memory(device):
    """GiB at the peak so far: of the device where it counts itself, else of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak / 2**30  # macOS counts bytes
    return peak / 2**20  # Linux KiB


def stop_processes():
    """End the process group behind finished work; several processes on a CPU end here, with 0.

    Files have to be closed and loggers finished before.
    """
    import torch.distributed as dist

    on_cpu = dist.get_backend() == "gloo"
    dist.barrier()  # gloo aborts a process whose peer has left
    dist.destroy_process_group()

    # gloo's worker thread frees the tensors of its last collective, here the barrier, when it gets
    # round to it, and asks for the interpreter's lock to do so. If Python is finalizing by then, it
    # ends the thread by force, inside a destructor, and C++ aborts the whole process ("terminate
    # called without an active exception", exit -6). destroy_process_group does not prevent it: the
    # mesh and FSDP still hold the group. So Python does not finalize. An error never comes here,
    # so it keeps its exit code.
    if on_cpu and WORLD_SIZE > 1:
        release_locks()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
