"""A `python` that has imported everything already, so that a stage of a tiny run starts at once.

    with warm(folder) as env:
        subprocess.run(["bash", "iterate.sh", ...], env=env)

A server imports what the stages import. In `env` the command `python` is a small client, which
sends its arguments to the server; the server forks, and the fork runs the script. For many small
runs on a CPU: the findings, the tests. One command at a time; its environment is the server's.
"""

import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Sends its folder, its arguments and where its output goes; ends with the status that comes back.
# 9 is the lock of iterate.sh, open where that takes it.
CLIENT = """
import json, os, socket, sys
files = [n for n in (1, 2, 9) if os.path.exists(f"/dev/fd/{n}")]
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    socket.send_fds(s, [json.dumps([os.getcwd(), sys.argv[2:]]).encode()], files)
    sys.exit(int(s.recv(16) or 1))
"""

IMPORTED = (
    "openai",
    "peft",
    "nanoaipo.policy",
    "nanoaipo.weights",
    "nanoaipo.rankers",
    "sklearn.feature_extraction.text",
)
TRANSFORMERS = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "DebertaV2Model",
)


def main(address):
    """Serve commands [folder, [script, arguments]] at this address of a Unix socket, for ever."""
    import_everything()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            client, _ = server.accept()
            with client:
                answer(client)


def import_everything():
    """Import what the stages import."""
    sys.path.insert(0, str(ROOT))
    for name in IMPORTED:
        importlib.import_module(name)

    import transformers

    for name in TRANSFORMERS:
        getattr(transformers, name)  # transformers imports a class when it is first asked for it


def answer(client):
    """Run a client's command in a fork, with the client's output, and send it the exit status."""
    # the client's own stdout and stderr come along as open files, and perhaps a lock
    message, descriptors, *_ = socket.recv_fds(client, 2**16, 3)
    child = os.fork()
    if child == 0:
        folder, arguments = json.loads(message)
        run_in_fork(folder, arguments, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)

    # the client waits for this, and so does the next one
    _, wait_status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(wait_status)
    client.send(str(status).encode())


def run_in_fork(folder, arguments, descriptors):
    """Run a script as the main program, with these for 1, 2 and perhaps 9; ends the process."""
    status = 1
    try:
        for descriptor, number in zip(descriptors, (1, 2, 9)):
            os.dup2(descriptor, number)
        os.chdir(folder)
        run_as_main(arguments)
        status = 0
    except SystemExit as e:
        status = exit_status(e.code)
    except BaseException:  # as any python that ends with an error
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not sys.exit: the fork must not go on in the server's loop


def run_as_main(arguments):
    """Do what `python ARGUMENTS` does, for a script or `-m MODULE`."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


def exit_status(code):
    """The status that Python gives for SystemExit(code); a message is printed, as it does."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return 1


@contextlib.contextmanager
def warm(folder, **env):
    """The environment in which `python` is such a server.

    The server lives in the folder and ends with the block. env: what its own environment has
    besides that of this process. Raises RuntimeError if it does not start.
    """
    # a folder with a command `python`, to stand first in PATH
    folder = Path(folder)
    address = folder / "socket"
    client = folder / "client.py"
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    client.write_text(CLIENT)
    # -I -S: the client imports nothing of the environment, which is what makes it quick
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" "{address}" "$@"\n')
    python.chmod(0o755)

    server = subprocess.Popen(
        [sys.executable, __file__, str(address)], env=os.environ | env, cwd=ROOT
    )
    try:
        wait_until_ready(server, address)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        yield os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix}
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(server, address):
    """Return when the server has bound its address; raises RuntimeError if it has ended instead."""
    while not address.exists():
        if server.poll() is not None:
            raise RuntimeError("the warm python did not start")
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
