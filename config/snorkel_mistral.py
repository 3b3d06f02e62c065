"""Snorkel-Mistral-PairRM-DPO (Snorkel AI's model card): DPO on three parts of UltraFeedback.

Leaves out: their three parts of the prompts (ours are drawn anew) and all that the card does not
tell: those lines are AIPO's.
"""
model = "mistralai/Mistral-7B-Instruct-v0.2"  # model card
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # model card
n_prompts = 20000                       # model card: three parts of 20K
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 3                          # model card
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # model card
temperature = 0.4                       # unpublished; AIPO's
top_k = 50                              # unpublished; AIPO's

# rank
ranker = "pairrm"                       # model card
ranker_model = "llm-blender/PairRM"     # its public weights
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # model card

# train
loss = "dpo"                            # model card
beta = 0.1                              # unpublished; ours
lr = 5e-7                               # unpublished; AIPO's
batch_size = 128                        # unpublished; ours
