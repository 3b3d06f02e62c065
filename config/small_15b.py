"""AIPO on a model of 1.5B parameters, one GPU of 24 GB.

Not a recipe of the paper, nothing in it is tuned.
Adapters, because 1.5e9 x 16 bytes for all weights are 24.7 GB.
"""
model = "Qwen/Qwen2.5-1.5B-Instruct"    # ours
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # AIPO's pool
n_prompts = 4096                        # ours: others at each iteration
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours
n_eval = 256                            # ours
iterations = 5                          # ours
processes = 1                           # ours: one GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # AIPO, Sec. 3
temperature = 0.7                       # ours: five answers of a small model that differ
top_k = 50                              # AIPO's repository
max_new_tokens = 1024                   # ours

# rank
ranker = "pairrm"                       # AIPO, Sec. 3
ranker_model = "llm-blender/PairRM"     # AIPO, Sec. 3
rank_batch_tokens = 8192                # ours, for 24 GB

# train
loss = "aipo"                           # AIPO, Eq. 10
beta = 0.1                              # AIPO, Sec. 4.1
alpha = 0.05                            # in AIPO's range
lambda_ = 0.2                           # in AIPO's range
lora_rank = 16                          # ours
lora_alpha = 16.0                       # ours
lr = 5e-6                               # ours, iREPO's rate for adapters (log)
batch_size = 64                         # ours: 64 steps per iteration
max_length = 1536                       # 512 + 1024
tokens_per_microbatch = 4096            # ours, for 24 GB
