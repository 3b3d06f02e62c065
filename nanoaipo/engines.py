"""Engines that sample from a model on this machine: vLLM, or transformers' generate.

    sample = load_engine("auto", model, eos_ids, max_tokens, dtype="bfloat16", ...)
    responses = sample(requests, n_responses=5, temperature=0.4, top_k=50, top_p=1.0,
                       max_new_tokens=2048)

A request is (prompt ids, seed). For each request `sample` returns a list of n_responses tuples
(ids, finished, log-prob in nats under the untempered model). Sampling ends at one of the eos_ids,
and soon behind any of the texts in `stop`.
"""

import importlib.util
import math
import os
import shutil
import subprocess
import time

from nanoaipo.clock import lap
from nanoaipo.errors import InputError
from nanoaipo.model_folders import CONVERT
from nanoaipo.processes import DTYPES

ENGINES = ("vllm", "transformers", "auto")


def load_engine(
    engine,
    model,
    eos_ids,
    max_tokens,
    *,
    dtype,
    seed,
    tensor_parallel,
    gpu_memory,
    generate_rows,
):
    """The function `sample` of an engine: vllm, transformers, or auto (vllm where it is installed).

    max_tokens: of the longest prompt and response together. Raises InputError, and so does `sample`
    where the model gives no log-probs.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype={dtype}: there are {', '.join(DTYPES)}")
    if engine not in ENGINES:
        raise InputError(f"--engine={engine}: there are {', '.join(ENGINES)}")

    # auto is vLLM where it is installed
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "auto":
        engine = "vllm" if has_vllm else "transformers"

    # one of the two is imported, which takes seconds
    if engine == "transformers":
        from nanoaipo.transformers_engine import TransformersEngine

        lap("starting")
        loaded = TransformersEngine(model, eos_ids, dtype=dtype, generate_rows=generate_rows)
        lap("loading")
        return with_logps_checked(loaded.sample, model)

    if not has_vllm:
        raise InputError(
            "--engine=vllm: vllm is not installed; `make vllm` or --engine=transformers"
        )
    sample = vllm_engine(
        model,
        eos_ids,
        max_tokens,
        dtype=dtype,
        seed=seed,
        tensor_parallel=tensor_parallel,
        gpu_memory=gpu_memory,
    )
    return with_logps_checked(sample, model)


def with_logps_checked(sample, model):
    """`sample`, which raises InputError where what it sampled has a log-prob that is not finite."""
    message = (
        f"{model}: its log-probs are not finite: its weights are damaged, "
        "or the temperature is too near to 0"
    )

    def sample_checked(requests, **settings):
        try:
            results = sample(requests, **settings)
        except RuntimeError as e:
            if "probability tensor" not in str(e):  # torch.multinomial's
                raise
            raise InputError(message) from e
        for responses in results:
            if not all(math.isfinite(logp) for _, _, logp in responses):
                raise InputError(message)
        return results

    return sample_checked


def context_length(model):
    """Tokens of prompt and response together that a model was built for."""
    from transformers import AutoConfig

    text_config = AutoConfig.from_pretrained(model).get_text_config()
    return getattr(text_config, "max_position_embeddings", 2**31)


def exact_attention(config):
    """The attn_implementation under which transformers computes this model exactly.

    None: its own choice, which is sdpa for nearly all. sdpa has no soft-cap on attention logits and
    swallows Gemma-2's without a word. Attention sinks it refuses by itself.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    return None


# ------------------------------------------------------------------------------------------- vLLM


def vllm_engine(model, eos_ids, max_tokens, *, dtype, seed, tensor_parallel, gpu_memory):
    """The function `sample` of vLLM, which schedules all requests in one call."""
    llm = start_vllm(
        model,
        max_tokens,
        dtype=dtype,
        seed=seed,
        tensor_parallel=tensor_parallel,
        gpu_memory=gpu_memory,
    )
    from vllm import SamplingParams  # only now: start_vllm sets the environment for it
    from vllm.exceptions import VLLMValidationError

    lap("loading")

    def sample(requests, *, n_responses, temperature, top_k, top_p, max_new_tokens, stop=()):
        # a request of vLLM's is a prompt and its parameters
        prompts = []
        params = []
        for ids, request_seed in requests:
            prompts.append({"prompt_token_ids": ids})
            try:
                params.append(
                    SamplingParams(
                        n=n_responses,
                        temperature=temperature,
                        top_k=top_k or -1,  # vLLM's off is -1
                        top_p=top_p,
                        max_tokens=max_new_tokens,
                        seed=request_seed,
                        logprobs=0,  # of the sampled token alone
                        stop_token_ids=sorted(eos_ids),
                        stop=list(stop),
                        detokenize=bool(stop),  # we decode; vLLM needs text only to find a stop
                    )
                )
            except VLLMValidationError as e:  # two greedy responses, a temperature above 2
                raise InputError(f"--engine=vllm: {e}") from e

        # outputs come in the order of the requests
        results = []
        for output in llm.generate(prompts, params):
            responses = [
                (list(o.token_ids), o.finish_reason == "stop", o.cumulative_logprob)
                for o in output.outputs
            ]
            results.append(responses)
        return results

    return sample


def start_vllm(model, max_tokens, *, dtype, seed, tensor_parallel, gpu_memory):
    """vLLM's LLM on the GPUs of this process, or on the CPU with its CPU build."""
    take_own_gpus(tensor_parallel, gpu_memory)
    import torch
    from vllm import LLM

    lap("starting")

    # how much memory it may take, and what a CPU needs besides
    if torch.cuda.is_available():
        memory = {"gpu_memory_utilization": gpu_memory}
    else:
        # Eager, because compiling takes longer than a small model samples. Every prompt is
        # prefilled whole, because in parts it loses the seed of its request ("CPU Generator does
        # not use offset", vLLM 0.32). In blocks of 32 tokens, not 128, the responses to a short
        # prompt share most of its prefill, too.
        memory = {
            "kv_cache_memory_bytes": 2 * 2**30,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "block_size": 32,
            "max_num_batched_tokens": max(8192, max_tokens),
        }
    try:
        return LLM(
            model,
            dtype=dtype,
            seed=seed,
            max_model_len=max_tokens,
            # what train.py reads: by itself vLLM would take pickles, and Mistral's other copy
            load_format="safetensors",
            logprobs_mode="raw_logprobs",  # before temperature, top_k and top_p, as train.py's are
            enable_prefix_caching=True,
            tensor_parallel_size=tensor_parallel,
            **memory,
        )
    except RuntimeError as e:
        if "Cannot find any model weights" not in str(e):
            raise
        raise InputError(
            f"{model}: no *.safetensors in it; other formats can run code and are not read: "
            f"{CONVERT}"
        ) from e


def take_own_gpus(tensor_parallel, gpu_memory):
    """Set the environment so that vLLM sees this process's GPUs alone; wait until they are free.

    Process k of a node takes tensor_parallel of the visible GPUs, from k * tensor_parallel on.
    Raises InputError when this process uses a GPU already, or there are too few.
    """
    # the engine lives and dies with this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

    # the GPUs of this process
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    first = local_rank * tensor_parallel
    every_gpu = ",".join(map(str, range(64)))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every_gpu).split(",")
    own = ",".join(visible[first : first + tensor_parallel])
    os.environ["CUDA_VISIBLE_DEVICES"] = own

    # without torchrun's variables, or the engine would join its world
    for name in (
        "TORCHELASTIC_USE_AGENT_STORE",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name, None)

    import torch

    # what CUDA finds then has to be as many
    if torch.cuda.is_initialized():
        raise InputError(
            "--engine=vllm: this process uses its GPU already; "
            "start the judge as a server and name it with --judge_url"
        )
    if not torch.version.cuda:  # the CPU build
        return
    n_gpus = torch.cuda.device_count()
    if n_gpus != tensor_parallel:
        raise InputError(
            f"--tensor_parallel={tensor_parallel}: process {local_rank} finds {n_gpus} GPUs; "
            "start fewer engines"
        )
    wait_for_gpus(own, gpu_memory)


def wait_for_gpus(gpus, share, patience=300, pause=5):
    """Wait until `share` of the memory of each of these GPUs is free, and print who holds it.

    gpus: as nvidia-smi -i names them; patience, pause: seconds. The stage before may still be
    ending. Raises InputError after `patience`. Without nvidia-smi it returns at once.
    """
    if not shutil.which("nvidia-smi"):
        return
    for seconds_left in range(patience, -1, -pause):
        message = short_of_memory(gpus, share)
        if message is None:
            return
        if seconds_left < pause:
            raise InputError(f"{message}; end that, or lower --gpu_memory")
        print(f"{message}; waiting, {seconds_left} s at most", flush=True)
        time.sleep(pause)


def short_of_memory(gpus, share):
    """A sentence on the first GPU of which less than `share` is free and who holds it, or None."""
    gpu_rows = nvidia_smi(gpus, "gpu=index,uuid,memory.free,memory.total")  # in MiB
    for name, gpu_uuid, free, total in gpu_rows:
        wanted = share * int(total)
        if int(free) >= wanted:
            continue
        holders = []
        processes = nvidia_smi(gpus, "compute-apps=gpu_uuid,pid,used_memory,process_name")
        for holder_uuid, pid, used, program in processes:
            if holder_uuid == gpu_uuid:
                holders.append(f"process {pid} ({used} MiB, {program})")
        held_by = "; ".join(holders) or "a process of another container"
        return (
            f"GPU {name}: {free} MiB are free, --gpu_memory={share} wants {wanted:.0f}; "
            f"it is held by {held_by}"
        )
    return None


def nvidia_smi(gpus, query):
    """The rows of a query of four columns, the third of them a number (MiB)."""
    command = ["nvidia-smi", "-i", gpus, f"--query-{query}", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    rows = [line.split(", ", 3) for line in output.splitlines()]
    # not [N/A], and not "No devices were found"
    return [row for row in rows if len(row) == 4 and row[2].isdigit()]
