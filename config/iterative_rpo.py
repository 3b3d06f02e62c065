"""Iterative RPO (arXiv 2404.19733) on GSM8K: reasons with the right answer against the others.

Leaves out: temperature 1.3 of the later iterations (go on by hand: --model=..., --temperature=1.3,
another --out), their wording of the task, and choosing the checkpoint on held-out problems. 70e9 x
16 bytes for all weights do not fit 8 x 80 GB (config/aipo_llama3_70b.py), so adapters.
"""
model = "meta-llama/Llama-2-70b-chat-hf"  # paper
prompts = "openai/gsm8k:main:train"     # paper, 7.5K, the same at every iteration
prompt_field = "question"               # the data set's
eval_prompts = "openai/gsm8k:main:test" # paper
eval_guard = ""                         # ours: they have answers, so they are the guard
eval_prompt_field = "question"          # the data set's
eval_temperature = 0.0                  # ours: greedy
iterations = 4                          # paper
processes = 8                           # ours: one node, a process per GPU
engines = 2                             # ours: 138 GB of weights
tensor_parallel = 4                     # ours: so four GPUs each

# generate
engine = "vllm"                         # ours
n_responses = 30                        # paper
temperature = 0.8                       # paper, the first iterations
top_k = 0                               # paper: names none

# rank
ranker = "answer"                       # paper: exact match with the gold answer
pair_rule = "right_wrong"               # paper: both in turn
max_pairs = 10                          # paper

# train
loss = "irpo"                           # Eq. 1
beta = 0.1                              # paper, tuned .05 to 1
lambda_ = 1.0                           # paper, tuned .25 to 2
lr = 7e-7                               # paper, for all weights
batch_size = 16                         # paper
max_steps = 5000                        # paper; one epoch here has 4,671 at most
lora_rank = 16                          # ours, see above
