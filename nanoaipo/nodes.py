"""Several nodes: iterate.sh runs on each of them, and what ends it badly on one ends it on all.

torchrun lets a stage begin on all nodes at once. But it does not tell the others when a node dies
in a stage that needs no collectives, or while node 0 evaluates alone, and then they would wait, or
end as if all were well. So each node is connected with node 0 from start to end. Through the
connection a node says, in the end, that it is done. Where it breaks before that, a node has died.
"""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time

from nanoaipo.errors import InputError
from nanoaipo.processes import end_with_parent

NODE_NUMBERS = ("SLURM_NODEID", "JOB_COMPLETION_INDEX")  # of Slurm, and of Kubernetes' indexed jobs
PATIENCE = 30 * 60  # seconds until all nodes have to be there
GO = b"go"  # node 0 says so when all are there
DONE = b"done"


def run_with_others(command, nodes, rank, endpoint):
    """Run this node's command while the other nodes run theirs; its exit code.

    rank: which of the nodes this is, None where the scheduler says it. endpoint: HOST:PORT of node
    0; we use the port behind it, torchrun that one. Raises InputError for settings that cannot be,
    and, with nothing left running here, when a node does not come or has died.
    """
    rank = number_of_this_node(rank, nodes)
    command = [*command, f"--this_node={rank}"]
    others = {}
    if nodes > 1:
        host, port = our_address(endpoint)
        if rank == 0:
            others = wait_for_nodes(nodes, port, command)
        else:
            others = {0: join_node_0(host, port, rank, command)}
            print(f"node {rank} of {nodes}", flush=True)

    # a signal that ends this process ends its children too, unless it is one that nohup ignores
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_by_signal)
    child = subprocess.Popen(
        command,
        env=os.environ | {"ITERATE_NODES": str(nodes)},
        start_new_session=True,  # a process group that can be killed as a whole
        preexec_fn=end_with_parent,
    )
    try:
        return watch(child, rank, others)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def end_by_signal(number, frame):
    sys.exit(128 + number)


# ---- who is who


def number_of_this_node(rank, nodes):
    """Which of the nodes this is: as it is set, else as the scheduler has numbered them."""
    if nodes < 1:
        raise InputError(f"--nodes={nodes}: has to be 1 at least")
    if nodes == 1:
        return 0
    for name in NODE_NUMBERS:
        if rank is None and os.environ.get(name, "").isdigit():
            rank = int(os.environ[name])
    if rank is None:
        raise InputError(
            f"--this_node is not set, and neither is {' or '.join(NODE_NUMBERS)}: "
            f"number the nodes from 0 to {nodes - 1}"
        )
    if not 0 <= rank < nodes:
        raise InputError(f"--this_node={rank}: of {nodes} nodes it is 0 to {nodes - 1}")
    return rank


def our_address(endpoint):
    """(host, port behind torchrun's) of HOST:PORT; raises InputError for anything else."""
    found = re.fullmatch(r"(.+):(\d+)", endpoint)
    if not found:
        raise InputError(
            f"--rendezvous={endpoint}: write HOST:PORT, where other nodes reach node 0"
        )
    return found[1].strip("[]"), int(found[2]) + 1


# ---- how they meet


def wait_for_nodes(nodes, port, command):
    """{rank: connection} of all other nodes, for node 0."""
    others = {}
    family = socket.AF_INET
    if socket.has_dualstack_ipv6():
        family = socket.AF_INET6
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as e:
        raise InputError(f"--rendezvous: port {port} behind it: {e.strerror}") from e

    end = time.monotonic() + PATIENCE
    with server:
        while len(others) < nodes - 1:
            missing = sorted(set(range(1, nodes)) - others.keys())
            print(f"node 0 of {nodes}, waits for nodes {missing}", flush=True)
            server.settimeout(max(1, end - time.monotonic()))
            try:
                connection, (address, *_) = server.accept()
                address = address.removeprefix("::ffff:")  # which says that it is of IPv4
            except TimeoutError:
                raise InputError(f"nodes {missing} have not come to port {port}") from None
            hello = read_hello(connection)
            if hello is None:  # a stranger
                connection.close()
                continue
            check_hello(hello, address, nodes, command)
            notice_loss(connection)
            others[hello["rank"]] = connection  # a node that was started again comes again

    for connection in others.values():
        send(connection, GO)
    return others


def read_hello(connection):
    """What a node says at first, {"rank": ..., "command": ...}, or None of a stranger."""
    connection.settimeout(10)
    try:
        with connection.makefile("rb") as f:
            hello = json.loads(f.readline(2**20))
        known = isinstance(hello["rank"], int) and isinstance(hello["command"], list)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    connection.settimeout(None)
    return hello if known else None


def check_hello(hello, address, nodes, command):
    """Raise InputError unless a node was started with our command but for its number."""
    rank = hello["rank"]
    if not 0 < rank < nodes:
        raise InputError(f"--this_node={rank}: {address} says so; node 0 is this one")
    theirs = [word for word in hello["command"] if not word.startswith("--this_node=")]
    ours = [word for word in command if not word.startswith("--this_node=")]
    if theirs != ours:
        raise InputError(
            f"node {rank} at {address} was started with another command: "
            f"{' '.join(theirs)}, here {' '.join(ours)}"
        )


def join_node_0(host, port, rank, command):
    """The connection to node 0, once it has said that all nodes are there."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=10)
            break
        except OSError as e:  # no such name yet, nobody there yet
            if time.monotonic() > end:
                raise InputError(f"--rendezvous: node 0 is not at {host}, port {port}: {e}") from e
        time.sleep(1)
    connection.settimeout(None)
    notice_loss(connection)
    hello = {"rank": rank, "command": command}
    send(connection, json.dumps(hello).encode() + b"\n")
    if receive(connection, len(GO)) != GO:
        raise lost(0)
    return connection


def notice_loss(connection):
    """Let the system find out within a minute that the other host has vanished."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def send(connection, message):
    """Say something; who has gone is found when it is listened to."""
    with contextlib.suppress(OSError):
        connection.sendall(message)


def receive(connection, n):
    """At most n bytes; none where the other side has gone."""
    try:
        return connection.recv(n)
    except OSError:
        return b""


def lost(rank):
    """The InputError for a node that has ended too early."""
    return InputError(
        f"node {rank} has ended, so this one ends too: run the same command again on every node"
    )


# ---- until all are done


def watch(child, rank, others):
    """Wait until this node's command and all others' are done; the exit code, 0 or 1."""
    at_work = dict(others)  # who has not said that it is done
    has_said = False
    while child.poll() is None or at_work:
        readable, _, _ = select.select(at_work.values(), [], [], 0.2)
        for other, connection in list(at_work.items()):
            if connection not in readable:
                continue
            if receive(connection, len(DONE)) != DONE:
                raise lost(other)
            del at_work[other]

        if child.returncode:
            return 1
        if child.returncode == 0 and rank > 0 and not has_said:
            send(others[0], DONE)
            has_said = True

    if child.returncode:
        return 1
    if rank == 0:
        for connection in others.values():
            send(connection, DONE)
    return 0
