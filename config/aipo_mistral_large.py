"""AIPO (arXiv 2409.08845) on Mistral-Large-2407, as far as 8 GPUs of 80 GB go: adapters.

Leaves out training all weights: 123e9 x 16 bytes are 1.97 TB, so five such nodes (README).
"""
model = "mistralai/Mistral-Large-Instruct-2407"  # Tab. 3
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the paper's pool, 61,135 prompts
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 5                          # ours; paper: up to 15, reports the best on Arena-Hard
processes = 8                           # ours: one node, a process per GPU
engines = 1                             # ours: 246 GB of weights
tensor_parallel = 8                     # ours: so all eight GPUs

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
lr = 5e-6                               # ours, iREPO's for adapters (log); paper: 5e-7, all weights
batch_size = 256                        # Sec. 4.2
max_length = 2560                       # 512 + 2048
tokens_per_microbatch = 4096            # ours: 31 GB of each GPU hold the frozen weights
lora_rank = 16                          # ours; the paper trains all weights
