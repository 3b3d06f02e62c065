"""A `python` that has imported everything already: it forks for each command, so that a stage of the tiny world starts at once.

    with warm(folder) as env:
        subprocess.run(["bash", "iterate.sh", ...], env=env)

For many small runs on a CPU: the findings, the tests. One command at a time; its environment is the server's.
"""
import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    socket.send_fds(s, [json.dumps([os.getcwd(), sys.argv[2:]]).encode()], [1, 2])
    sys.exit(int(s.recv(16) or 1))
"""


def run_here(command, fds):
    """In a fork: the script as the main program, output to these descriptors; ends the process with its exit status."""
    status = 1
    try:
        folder, sys.argv = command
        for k, fd in enumerate(fds, 1):
            os.dup2(fd, k)
        os.chdir(folder)
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__")
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        isinstance(e.code, str) and print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(door):
    """Import what the stages import, then run each command [folder, [script, arguments]] that comes; answer its exit status."""
    sys.path.insert(0, str(ROOT))
    for name in ("openai", "peft", "nanoaipo.policy", "nanoaipo.rankers", "sklearn.feature_extraction.text"):
        __import__(name)
    import transformers
    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "LlamaForCausalLM", "LlamaForSequenceClassification", "DebertaV2Model"):
        getattr(transformers, name)                                     # it imports on first sight
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(door)
        server.listen()
        while True:
            client, _ = server.accept()
            with client:
                message, fds, *_ = socket.recv_fds(client, 2**16, 2)
                child = os.fork()
                if not child:
                    run_here(json.loads(message), fds)
                for fd in fds:
                    os.close(fd)
                client.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


@contextlib.contextmanager
def warm(folder, **env):
    """The environment in which `python` is such a server; it lives in the folder, and ends with the block."""
    folder = Path(folder)
    door, python = folder / "door", folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    (folder / "client.py").write_text(CLIENT)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{folder}/client.py" "{door}" "$@"\n')
    python.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(door)], env=os.environ | env, cwd=ROOT)
    try:
        while not door.exists():
            server.poll() is None or sys.exit("the warm python did not start")
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.1)
        yield os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    serve(sys.argv[1])
