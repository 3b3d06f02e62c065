"""RLHFlow's iterative DPO (arXiv 2405.07863) on its own Llama-3-8B SFT.

Leaves out: their prompts (UltraFeedback stands in; theirs are RLHFlow/iterative-prompt-v1). The
reference is the previous policy, as in their later scripts; their first had the initial one. Label
smoothing .1 is another script's, with K = 4 (--label_smoothing=0.1).
"""
model = "RLHFlow/LLaMA3-SFT"            # paper
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # ours
n_prompts = 20000                       # paper
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 3                          # paper
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 8                         # paper
temperature = 1.0                       # paper
top_p = 1.0                             # paper
top_k = 0                               # paper: names none
max_prompt_tokens = 1000                # its training script

# rank
ranker = "reward"                       # paper
ranker_model = "sfairXC/FsfairX-LLaMA3-RM-v0.1"  # paper
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper, ties dropped

# train
loss = "dpo"                            # paper
beta = 0.1                              # paper
lr = 5e-7                               # paper, cosine
batch_size = 128                        # paper
epochs = 2                              # paper
max_length = 2048                       # paper
