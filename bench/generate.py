"""generate.py against the bare engine: the same vLLM, prompts, seeds and settings, alternating, tokens per second after start-up.

    python bench/generate.py                    vLLM's CPU build (make vllm) or a GPU's; the embedded world's base model (tiny/prepare.py)
    python bench/generate.py --prompts=1000 --rounds=3 --model=MODEL --max_new_tokens=2048 --dtype=bfloat16 --block=512

Bare is one llm.generate call on ids, its outputs dropped. Ours is counted from the loaded engine to the finished file: requests, ids to text,
records, and with fewer prompts in a block than there are the gaps between blocks too. Each side is a process of its own.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
asked = {"prompts": "1000", "rounds": "3", "model": os.path.join(HERE, "..", "tiny/world/base"), "max_new_tokens": "64", "dtype": "float32", "block": "2048"}
asked |= dict(a.lstrip("-").split("=") for a in sys.argv[1:] if "=" in a)


def side(name, folder):
    """Print {seconds, tokens}."""
    from nanoaipo.files import read_records
    from nanoaipo.seeds import derive_seed
    sys.argv = ["generate.py", f"--model={asked['model']}", f"--prompts={folder}/prompts.jsonl", f"--out={folder}/{name}.jsonl", "--engine=vllm", "--n_responses=5",
                "--temperature=1.0", f"--max_new_tokens={asked['max_new_tokens']}", f"--dtype={asked['dtype']}", f"--block={asked['block']}"]
    import generate
    load, began = generate.load_engine, []

    def timed(*arguments):
        sample = load(*arguments)
        began.append(time.perf_counter())
        if name == "ours":
            return sample
        llm = next(c.cell_contents for c in sample.__closure__ if type(c.cell_contents).__name__ == "LLM")
        return llm

    if name == "ours":
        generate.load_engine = timed
        generate.main()
        seconds = time.perf_counter() - began[0]
        tokens = sum(len(r["ids"]) for _, row in read_records(f"{folder}/ours.jsonl") for r in row["responses"])
    else:
        tokenizer, ends = generate.load_tokenizer(asked["model"])
        rows, _ = generate.read_pool(tokenizer, generate.max_prompt_tokens)
        llm = timed("vllm", asked["model"], ends, generate.max_prompt_tokens + generate.max_new_tokens, generate.config)
        from vllm import SamplingParams
        settings = [SamplingParams(n=5, temperature=1.0, top_k=50, top_p=1.0, max_tokens=generate.max_new_tokens, seed=derive_seed(0, 0, row["id"]), logprobs=0,
                                   stop_token_ids=sorted(ends), detokenize=False) for row in rows]
        began = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": row["prompt_ids"]} for row in rows], settings)
        seconds = time.perf_counter() - began
        tokens = sum(len(o.token_ids) for output in outputs for o in output.outputs)
    print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side(*sys.argv[2:4])
        sys.exit(0)
    best = {}
    for n in range(int(asked["rounds"])):
        for name in (("ours", "bare") if n % 2 else ("bare", "ours")):
            with tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(HERE, "..", "tiny/world/prompts.jsonl")) as f, open(f"{folder}/prompts.jsonl", "w") as g:
                    g.writelines(line for line, _ in zip(f, range(int(asked["prompts"]))))
                command = [sys.executable, __file__, "--side", name, folder, *(f"--{k}={v}" for k, v in asked.items())]
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            rate = result["tokens"] / result["seconds"]
            print(f"round {n + 1} {name}: {result['tokens']} tokens, {rate:.0f} tokens/s", flush=True)
            best[name] = max(rate, best.get(name, 0))
    print(f"{best['ours']:.0f} against {best['bare']:.0f} tokens/s, {best['ours'] / best['bare']:.1%} of the bare engine")
