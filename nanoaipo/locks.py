"""Locks: no two processes write one output at a time, and no two runs one folder.

    hold_lock("pairs.jsonl.lock")                   in a script: until it ends
    python -m nanoaipo.locks 9 out/RUN/lock $$      in a shell that has opened it (exec 9<> FILE)

A lock is a file that its holder keeps locked by flock. The system frees it when the holder dies,
however it dies: a file that a killed process left is no lock. Hosts that share a file system see
each other's where it has such locks: NFS, CephFS, GPFS, Lustre mounted with `flock`. A host that
vanishes holds its locks until the server forgets it (NFS 4: about 90 seconds). Where a file system
has no locks a line says so, and the work goes on without.
"""

import contextlib
import fcntl
import os
import socket
import sys
import time

from nanoaipo.errors import InputError, disk_fault

held = {}  # path: open file, of the locks of this process


def hold_lock(path):
    """Lock this file until release_locks() or the end of the process.

    Raises InputError, which names the holder, where another process has locked it.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    while path not in held:
        f = open(path, "a+", encoding="utf-8")
        lock_file(f, path, os.getpid())

        # a holder that ends removes the file, perhaps between the two lines above
        if os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
            held[path] = f
        else:
            f.close()


def release_locks():
    """Remove the locks of this process."""
    for path, f in held.items():
        with contextlib.suppress(OSError):  # somebody has removed it
            os.remove(path)
        f.close()
    held.clear()


def forget_locks():
    """In a fork: close the files, which are its parent's locks and must end with that."""
    for f in held.values():
        f.close()
    held.clear()


os.register_at_fork(after_in_child=forget_locks)


def lock_file(f, path, pid):
    """Lock an open file for the process `pid`, and write into it who that is.

    Raises InputError, which names the holder, where another process has locked it.
    """
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        holder = f.read().strip() or "another process"
        raise InputError(
            f"{path}: locked by {holder}: wait for it or end it, then run the same command again"
        ) from None
    except OSError as e:
        print(f"{path}: {e.strerror}: nothing keeps a second run from writing here", flush=True)

    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    f.seek(0)
    f.truncate()
    f.write(f"process {pid} on {socket.gethostname()}, since {since}\n")
    f.flush()
    os.fsync(f.fileno())  # for other hosts


def main():
    """Lock a file that the calling shell has opened, for as long as the shell has it open."""
    descriptor, path, pid = sys.argv[1:]
    try:
        with open(int(descriptor), "r+", encoding="utf-8") as f:
            lock_file(f, path, pid)
    except InputError as e:
        sys.exit(str(e))
    except OSError as e:
        sys.exit(disk_fault(e, path) or f"{path}: {e}")


if __name__ == "__main__":
    main()
