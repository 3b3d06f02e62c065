"""AIPO's Table 1 (arXiv 2409.08845), row PairRM(UF).

UltraFeedback's two responses, ranked again by PairRM; one pass of DPO.
Leaves out: the limit of 2,016 tokens, because these responses come as texts; pairs above max_length
are dropped.
"""
model = "mistralai/Mistral-7B-Instruct-v0.2"  # Tab. 1
candidates = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # Tab. 1: chosen, rejected
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # Tab. 1: one pass
processes = 8                           # ours: one node, a process per GPU

# rank
ranker = "pairrm"                       # Tab. 1
ranker_model = "llm-blender/PairRM"     # Sec. 3
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # of the two

# train
loss = "dpo"                            # Tab. 1
beta = 0.1                              # searched .1, .5, 1; the table's is not in our notes
lr = 5e-7                               # Sec. 4.1, cosine with 10 % warm-up, one epoch
batch_size = 128                        # Sec. 4.1
max_length = 2560                       # 512 + 2048 (repository)
tokens_per_microbatch = 8192            # ours, for GPUs of 80 GB
compile = True                          # ours: 1.4 times as fast on an H100
