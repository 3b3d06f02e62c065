"""SPPO (arXiv 2405.00675) on Llama-3-8B-Instruct.

Leaves out: RMSprop (AdamW here), PairRM on the templated prompt (bare here), their three parts of
the prompts (drawn anew here), and cutting: a pair above max_length is dropped. Their win rates come
from differences of llm-blender's scores, which add both orders: twice our log-odds.
"""
model = "meta-llama/Meta-Llama-3-8B-Instruct"  # paper
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # paper
n_prompts = 20000                       # paper: three parts
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 3                          # paper
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # paper
temperature = 1.0                       # paper; its code has .7
top_p = 1.0                             # paper; its code has .9
top_k = 0                               # paper: names none
max_prompt_tokens = 512                 # code

# rank
ranker = "pairrm"                       # paper
ranker_model = "llm-blender/PairRM"     # its public weights
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper, by score; q_w, q_l: win rates, itself included

# train
loss = "sppo"                           # Eq. 4.7
beta = 0.001                            # paper: eta = 1000
lr = 5e-7                               # paper
schedule = "linear"                     # paper
warmup = 0.1                            # paper
batch_size = 64                         # paper
epochs = 1                              # code, with its schedule; paper: the first of 18
max_length = 1024                       # code
