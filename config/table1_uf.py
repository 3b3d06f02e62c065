"""AIPO's Table 1 (arXiv 2409.08845), row UF: one pass of DPO on UltraFeedback's pairs as they are.

Leaves out the repository's filters: URLs in the chosen response, prompts above 512 and responses
above 2,016 tokens.
"""
model = "mistralai/Mistral-7B-Instruct-v0.2"  # Tab. 1
pairs = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # Tab. 1, 61,135 pairs
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # Tab. 1: one pass
processes = 8                           # ours: one node, a process per GPU

# train
loss = "dpo"                            # Tab. 1
beta = 0.1                              # searched .1, .5, 1; the table's is not in our notes
lr = 5e-7                               # Sec. 4.1, cosine with 10 % warm-up, one epoch
batch_size = 128                        # Sec. 4.1
max_length = 2560                       # 512 + 2048 (repository)
tokens_per_microbatch = 8192            # ours, for GPUs of 80 GB
compile = True                          # ours: 1.4 times as fast on an H100
