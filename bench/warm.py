"""A `python` that has imported everything already, so that a stage of a tiny run starts at once.

    python bench/warm.py bash iterate.sh config/tiny.py ...

    with warm(folder) as env:
        subprocess.run(["bash", "iterate.sh", ...], env=env)

A server imports the packages that the stages import. In the command's environment `python` is a
small client, which sends its arguments to the server; the server forks, and the fork runs the
script, of whichever copy of the code. For many small runs on a CPU: the demo, the findings, the
tests. What a package reads from the environment when it is imported is the server's; all else is
the client's. A client that is killed takes its fork along.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Sends where its output goes, its folder, environment and arguments; ends with the status that
# comes back. 9 is the lock of iterate.sh, open where that takes it.
CLIENT = """
import json, os, signal, socket, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
files = [n for n in (1, 2, 9) if os.path.exists(f"/dev/fd/{n}")]
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    socket.send_fds(s, [b"0"], files)
    s.sendall(json.dumps([os.getcwd(), dict(os.environ), sys.argv[2:]]).encode() + b"\\n")
    sys.exit(int(s.recv(16) or 1))
"""

IMPORTED = (
    "openai",
    "peft",
    "nanoaipo.policy",
    "nanoaipo.weights",
    "nanoaipo.rankers",
    "sklearn.feature_extraction.text",
    "torch.distributed.run",
)
TRANSFORMERS = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "DebertaV2Model",
)


# ------------------------------------------------------------------------------------ the server


def serve(address):
    """Serve commands at this address of a Unix socket, each by a process of its own, for ever."""
    import_everything()
    signal.signal(signal.SIGCHLD, reap)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                answer(client)
                os._exit(0)
            client.close()


def reap(*_):
    """Let the processes go that have answered."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def import_everything():
    """Import the packages that the stages import, but keep none of our own modules."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT))
    for name in IMPORTED:
        importlib.import_module(name)

    import transformers

    for name in TRANSFORMERS:
        getattr(transformers, name)  # transformers imports a class when it is first asked for it

    # ours read RANK when they are imported, and a fork may run another copy of them
    for name in list(sys.modules):
        if name.partition(".")[0] in ("nanoaipo", "configurator", "losses"):
            del sys.modules[name]
    sys.path[:] = before[1:]  # without the folder of this file


def answer(client):
    """Run a client's command in a fork, with the client's output, and send it the exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # the client's own stdout and stderr come along as open files, and perhaps a lock
    _, descriptors, *_ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as lines:
        folder, env, arguments = json.loads(lines.readline())

    # the fork holds one end of a pipe: at the other one can see its end
    its_end, of_fork = os.pipe()
    child = os.fork()
    if child == 0:
        client.close()
        run_in_fork(folder, env, arguments, descriptors)
    os.close(of_fork)
    for descriptor in descriptors:
        os.close(descriptor)

    # a client says no more, unless it is killed and hangs up
    ended, _, _ = select.select([its_end, client], [], [])
    if its_end not in ended:
        os.kill(child, signal.SIGKILL)
    _, wait_status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(wait_status)
    with contextlib.suppress(OSError):  # the client is no more
        client.send(str(status).encode())


# -------------------------------------------------------------------------------------- the fork


def run_in_fork(folder, env, arguments, descriptors):
    """Run a script as the main program, with these for 1, 2 and perhaps 9; ends the process."""
    status = 1
    try:
        for descriptor, number in zip(descriptors, (1, 2, 9)):
            os.dup2(descriptor, number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(env)
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
    """Do what `python ARGUMENTS` does, for a script, `-m MODULE` or `-c CODE`."""
    kind = arguments[0]
    first = os.path.dirname(os.path.abspath(kind))
    if kind in ("-m", "-c"):
        first = os.getcwd()
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [first, *filter(None, others)]

    if kind == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
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

    # in a group of its own: Ctrl-C ends the clients, and they their forks
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(address)],
        env=os.environ | env,
        cwd=ROOT,
        process_group=0,
    )
    try:
        wait_until_ready(server, address)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        yield os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)  # what it runs, too
        server.wait()


def wait_until_ready(server, address):
    """Return when the server has bound its address; raises RuntimeError if it has ended instead."""
    while not address.exists():
        if server.poll() is not None:
            raise RuntimeError("the warm python did not start")
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.1)


def end(number, _):
    """End by SystemExit, which passes the `finally` of `warm`; the status is a shell's."""
    sys.exit(128 + number)


def run_command(command):
    """Run a command with such a python; its exit status."""
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    with tempfile.TemporaryDirectory() as folder, warm(folder) as env:
        return subprocess.run(command, env=env).returncode


def main():
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
