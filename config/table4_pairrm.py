"""AIPO's comparison of rankers (arXiv 2409.08845, Tab. 4), row PairRM.

The table's base model is not in our notes, and it ranks responses to the pool's own instructions
(README): all but the ranker is the last row of Table 1, ours.
"""
model = "mistralai/Mistral-7B-Instruct-v0.2"  # ours
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # the paper's pool
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # ours
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
new_instructions = 20000                # Sec. 4.2
min_prompt_tokens = 3                   # of an instruction (repository)
n_responses = 5                         # N (Sec. 3)
temperature = 0.4                       # repository default, the paper is silent
top_k = 50                              # repository
max_new_tokens = 2048                   # repository
max_prompt_tokens = 512                 # templated prompt (repository)

# rank
ranker = "pairrm"                       # Tab. 4
ranker_model = "llm-blender/PairRM"     # Sec. 3
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper or repository
max_response_tokens = 2016              # repository

# train
loss = "dpo"                            # ours
beta = 0.1                              # repository (stage_dpo.yaml)
lr = 5e-7                               # Sec. 4.1
batch_size = 128                        # Sec. 4.1
max_length = 2560                       # 512 + 2048 (repository)
tokens_per_microbatch = 8192            # ours, for GPUs of 80 GB
compile = True                          # ours: 1.4 times as fast on an H100
