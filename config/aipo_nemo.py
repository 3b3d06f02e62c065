"""AIPO (arXiv 2409.08845) on Mistral-Nemo-Instruct-2407, one node of 8 GPUs.

The paper searched its hyper-parameters on this model. Behind each setting stands its source: a
section, table or equation of the paper, its official code (repository), or ours where neither says.
"""
model = "mistralai/Mistral-Nemo-Instruct-2407"  # Tab. 3
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the paper's pool, 61,135 prompts
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 5                          # ours; paper: up to 15, reports the best on Arena-Hard
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
new_instructions = 20000                # per iteration (Sec. 4.2), by self-instruct from this pool
min_prompt_tokens = 3                   # of an instruction (repository)
n_responses = 5                         # N (Sec. 3)
temperature = 0.4                       # repository default, the paper is silent
top_k = 50                              # repository
max_new_tokens = 2048                   # repository
max_prompt_tokens = 512                 # templated prompt (repository)

# rank
ranker = "pairrm"                       # Sec. 3
ranker_model = "llm-blender/PairRM"     # Sec. 3; z = mean log-odds of both orders
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper or repository
max_response_tokens = 2016              # repository; removes every truncated response

# train
loss = "aipo"                           # Eq. 10
beta = 0.1                              # Sec. 4.1
alpha = 0.05                            # searched .03, .05, .07 on Nemo; the best is not stated
lambda_ = 0.2                           # searched .2, .5 on Nemo; the best is not stated
lr = 5e-7                               # Sec. 4.1, cosine with 10 % warm-up, one epoch
batch_size = 256                        # Sec. 4.2
max_length = 2560                       # 512 + 2048
tokens_per_microbatch = 8192            # ours, for GPUs of 80 GB
compile = True                          # ours: 1.4 times as fast on an H100
