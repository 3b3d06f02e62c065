"""Several nodes: iterate.sh on two hosts, which are network namespaces of this machine.

Each host has a name, an address and processes of its own, and is killed as a whole. They share this
machine's file system. Where namespaces cannot be made (it takes root) these tests are skipped.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import NO_GPU, ROOT
from test_faults import holder_of, is_alive, wait_for
from test_files import write_lines
from test_loop import hashes, read_json

from nanoaipo import estimate, nodes, stages
from nanoaipo.errors import InputError

HOSTS = (f"aipo-{os.getpid()}-0", f"aipo-{os.getpid()}-1")  # at 10.77.0.1 and 10.77.0.2
SMALL = (
    "--n_prompts=8",
    "--n_responses=3",
    "--iterations=1",
    "--max_new_tokens=16",
    "--batch_size=2",
    "--checkpoint_every=1",
    "--eval_prompts=",
)
PATH = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
ENV = os.environ | NO_GPU | {"PATH": PATH, "VIRTUAL_ENV": sys.prefix}

# ------------------------------------------------------------------------------------ two hosts


def as_root(command):
    """Run a command; skip the test where this machine does not let us."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no two hosts can be made here: {command}: {done.stderr.strip()}")


def remove_hosts():
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
        shutil.rmtree(f"/etc/netns/{host}", ignore_errors=True)


@pytest.fixture(scope="module")
def hosts():
    """Make two hosts with a cable between them; each knows both by name."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("no two hosts can be made here: it takes root and the command ip")
    try:
        names = f"127.0.0.1 localhost\n10.77.0.1 {HOSTS[0]}\n10.77.0.2 {HOSTS[1]}\n"
        for host in HOSTS:
            as_root(f"ip netns add {host}")
            os.makedirs(f"/etc/netns/{host}")  # whose files `ip netns exec` puts over /etc
            Path(f"/etc/netns/{host}/hosts").write_text(names)
        as_root(f"ip link add eth0 netns {HOSTS[0]} type veth peer name eth0 netns {HOSTS[1]}")
        for k, host in enumerate(HOSTS):
            as_root(f"ip -n {host} addr add 10.77.0.{k + 1}/24 dev eth0")
            as_root(f"ip -n {host} link set eth0 up")
            as_root(f"ip -n {host} link set lo up")
        yield
    finally:
        remove_hosts()


def start(host, *arguments):
    """Start a small run of iterate.sh on a host; killing this process kills all of the host's."""
    command = ["ip", "netns", "exec", host, "unshare", "--uts", "--pid", "--fork", "--mount-proc"]
    command += ["--kill-child", "bash", "-c", 'hostname "$0" && bash iterate.sh "$@"', host]
    command += ["config/tiny.py", *SMALL, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_both(out, *arguments):
    """Start a run on both hosts, the second one first."""
    arguments = (f"--out={out}", "--nodes=2", f"--rendezvous={HOSTS[0]}:29500", *arguments)
    node_1 = start(HOSTS[1], *arguments, "--this_node=1")
    node_0 = start(HOSTS[0], *arguments, "--this_node=0")
    return [node_0, node_1]


def finish(processes):
    """Wait for processes; their exit codes and what they printed."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def kill_host(victim, out, is_there):
    """Start a run on both hosts, and kill one when a file is there; what the other one printed."""
    both = start_both(out)
    try:
        wait_for(is_there, seconds=300)
    finally:
        both[victim].kill()
    codes, outputs = finish(both)
    survivor = 1 - victim
    assert codes[survivor] == 1, outputs[survivor]
    return outputs[survivor]


@pytest.fixture(scope="module")
def finished(hosts, tmp_path_factory):
    """(Folder, outputs) of a run of two hosts: one dies in generate, the other in train."""
    subprocess.run([sys.executable, "tiny/prepare.py"], cwd=ROOT, check=True)
    out = tmp_path_factory.mktemp("cluster") / "run"
    lock = out / "iter_1" / "candidates-00001-of-00002.jsonl.lock"
    checkpoint = out / "iter_1" / "model.tmp" / "step_000001"

    in_generate = kill_host(1, out, lambda: holder_of(lock))
    assert not list(out.glob("iter_1/pairs*"))
    in_train = kill_host(0, out, checkpoint.exists)
    assert not (out / "iter_1" / "model").exists()
    codes, outputs = finish(start_both(out))

    assert codes == [0, 0], outputs
    return out, in_generate, in_train, *outputs


def test_a_host_that_dies_ends_the_other_and_the_same_commands_go_on(finished):
    out, in_generate, in_train, of_node_0, of_node_1 = finished

    line = "node 1 has ended, so this one ends too: run the same command again on every node\n"
    assert line in in_generate
    assert "iteration 1: train" in in_train
    assert "going on from" in of_node_0  # a checkpoint
    assert "is complete: 1 iterations" in of_node_0
    assert "is complete: 1 iterations" not in of_node_1
    assert not [*out.glob("**/*.tmp"), *out.glob("iter_*/*.lock")]


def test_the_artefacts_are_those_of_two_processes_on_one_node(finished, tmp_path):
    """All bytes: the same processes take the same shares and add up in the same order."""
    out, *_ = finished
    command = ["bash", "iterate.sh", "config/tiny.py", *SMALL, f"--out={tmp_path}/run"]

    done = subprocess.run([*command, "--processes=2"], cwd=ROOT, env=ENV, capture_output=True)

    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(tmp_path / "run")


def test_all_nodes_answer_and_node_0_alone_evaluates_and_reports(hosts, tmp_path):
    evaluation = ("--iterations=0", "--eval_prompts=tiny/world/heldout.jsonl", "--n_eval=4")

    codes, (of_node_0, of_node_1) = finish(start_both(tmp_path / "run", *evaluation))

    assert codes == [0, 0], of_node_0
    assert "-00000-of-00002.jsonl" in of_node_0
    assert "-00001-of-00002.jsonl" in of_node_1
    assert read_json(tmp_path, "run", "iter_0", "eval.json")["n"] == 4
    assert (tmp_path / "run" / "report.html").exists()
    assert "iteration 0: eval" not in of_node_1


# ------------------------------------------------------------------------- starting and ending

NODE = """
import sys
from nanoaipo.errors import InputError
from nanoaipo.nodes import run_with_others

rank, nodes, port, code = sys.argv[1:]
try:
    command = ["bash", "-c", code, "iterate.sh"]
    sys.exit(run_with_others(command, int(nodes), int(rank), f"localhost:{port}"))
except InputError as e:
    sys.exit(str(e))
"""


@pytest.fixture
def port():
    """A free port whose next one is free, too; below 32768, so that no client gets it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as next_one:
            one.bind(("", port))
            next_one.bind(("", port + 1))
            return port


def start_node(rank, nodes, port, code):
    """Start a node whose command is this code of bash; in it $1 is --this_node=RANK."""
    command = [sys.executable, "-c", NODE, *map(str, (rank, nodes, port, code))]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_nodes_end_when_all_are_done(port, tmp_path):
    code = f"if [[ $1 == *2 ]]; then sleep 1; fi; touch {tmp_path}/$1"

    codes, outputs = finish([start_node(k, 3, port, code) for k in (0, 1, 2)])

    assert codes == [0, 0, 0], outputs
    assert len(os.listdir(tmp_path)) == 3
    assert "node 0 of 3, waits for nodes [1, 2]\n" in outputs[0]


def test_what_fails_on_a_node_ends_all_of_them_and_leaves_nothing(port, tmp_path):
    code = f"if [[ $1 == *1 ]]; then sleep 1; exit 7; fi; sleep 300 & echo $! > {tmp_path}/$1; wait"

    codes, outputs = finish([start_node(k, 3, port, code) for k in (0, 1, 2)])

    assert codes == [1, 1, 1]
    assert "node 1 has ended, so this one ends too" in outputs[0]
    assert "node 0 has ended, so this one ends too" in outputs[2]
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_alive, pids)), seconds=10)


def test_a_signal_to_a_node_ends_its_work_and_the_other_node(port, tmp_path):
    both = [start_node(k, 2, port, f"touch {tmp_path}/$1; sleep 300") for k in (0, 1)]
    wait_for(lambda: len(os.listdir(tmp_path)) == 2)
    both[0].send_signal(signal.SIGTERM)

    codes, _ = finish(both)

    assert codes == [128 + signal.SIGTERM, 1]


def test_a_node_with_another_command_is_refused(port):
    codes, outputs = finish([start_node(k, 2, port, f"echo {k}") for k in (0, 1)])

    assert codes == [1, 1]
    assert "was started with another command: bash -c echo 1 iterate.sh, here bash" in outputs[0]


def test_a_stranger_at_the_port_is_no_node(port):
    node_0 = start_node(0, 2, port, "true")
    assert "waits for nodes [1]" in node_0.stdout.readline()
    for message in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": "1"}\n', b""):
        with socket.create_connection(("localhost", port + 1)) as s:
            s.sendall(message)

    codes, outputs = finish([node_0, start_node(1, 2, port, "true")])

    assert codes == [0, 0], outputs


def test_the_number_of_a_node_is_set_or_the_schedulers(monkeypatch):
    for name in nodes.NODE_NUMBERS:
        monkeypatch.delenv(name, raising=False)

    assert nodes.number_of_this_node(2, 4) == 2
    with pytest.raises(InputError, match="--this_node is not set, and neither is SLURM_NODEID"):
        nodes.number_of_this_node(None, 4)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert nodes.number_of_this_node(None, 4) == 3
    with pytest.raises(InputError, match="--this_node=3: of 3 nodes it is 0 to 2"):
        nodes.number_of_this_node(None, 3)
    with pytest.raises(InputError, match="--rendezvous=head: write HOST:PORT"):
        nodes.our_address("head")
    assert nodes.our_address("[fd00::1]:29500") == ("fd00::1", 29501)


def test_nodes_that_a_recipe_sets_belong_on_the_command_line(tmp_path):
    recipe = tmp_path / "x.py"
    recipe.write_text('model = "tiny/world/base"\nnodes = 2\n')

    done = subprocess.run(
        ["bash", "iterate.sh", recipe, f"--out={tmp_path}/run"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stderr.endswith("several nodes want --nodes=N on the command line\n")
    assert not (tmp_path / "run").exists()


def test_a_preflight_counts_the_processes_of_all_nodes():
    settings = SimpleNamespace(nodes=4, processes=8, engines=2, engine="vllm", response_tokens=1.0)
    both = estimate.resolve(settings)
    assert (both.processes, both.engines) == (32, 8)

    settings.engines = 0
    assert estimate.resolve(settings).engines == 32


# ------------------------------------------------------------------- a folder that is seen late

OPEN = """
import json, sys
from nanoaipo import stages
from nanoaipo.errors import InputError

try:
    is_done = stages.open_stage("model", "", json.loads(sys.argv[1]), "pairs") is None
    print(is_done, flush=True)
except InputError as e:
    print(e, flush=True)
sys.stdin.read()  # the first process keeps the store in which they agree
"""


@contextlib.contextmanager
def opening(rank, folder, port, settings):
    """A process that opens a stage in a folder, one of two on as many nodes."""
    env = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", OPEN, json.dumps(settings)],
        cwd=folder,
        env=ENV | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:  # without the first one the second waits for hours
        process.kill()
        process.communicate()


@pytest.fixture
def views(tmp_path, monkeypatch):
    """Two views of one folder: in the first a stage is complete, the second is of before."""
    first = tmp_path / "first"
    late = tmp_path / "late"
    first.mkdir()
    late.mkdir()
    monkeypatch.chdir(first)
    write_lines(first / "pairs.jsonl", {"id": "a"})
    settings = {"pairs": "pairs.jsonl", "beta": 0.1}
    manifest = stages.open_stage("model", "", settings, "pairs")
    os.makedirs("model")
    Path("model/model.safetensors").write_text("weights")
    stages.finish_folder("model", manifest)
    return first, late, settings


def test_a_node_that_sees_the_folder_late_decides_as_the_first_node(views, port):
    first, late, settings = views
    with opening(0, first, port, settings) as one, opening(1, late, port, settings) as other:
        time.sleep(1)
        shutil.copy(first / "pairs.jsonl", late)

        # the model is not there at all
        assert one.stdout.readline() == "model: complete, nothing to do\n"
        assert other.stdout.readline() == "model: complete, nothing to do\n"


def test_a_node_with_other_settings_is_refused(views, port):
    first, late, settings = views
    shutil.copy(first / "pairs.jsonl", late)
    others = settings | {"beta": 0.2}
    with opening(0, first, port, settings) as one, opening(1, late, port, others) as other:
        assert one.stdout.readline() == "model: complete, nothing to do\n"
        line = other.stdout.readline()

    assert line.startswith("model: on this node 'beta' is 0.2, on the first one 0.1: every node")
