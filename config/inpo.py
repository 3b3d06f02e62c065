"""INPO (arXiv 2407.00617) on RLHFlow's Llama-3-8B SFT, its objective only.

Leaves out: the mixed reference (a third of it the first policy's; here the last iterate's alone),
the knock-out tournament (here best against worst), their preference model (PairRM stands in) and
prompts (UltraFeedback stands in). So it is not expected to repeat theirs.
"""
model = "RLHFlow/LLaMA3-SFT"            # paper: Llama-3-8B SFT
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # ours
n_prompts = 20000                       # paper
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 3                          # paper
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 8                         # paper
temperature = 1.0                       # ours, RLHFlow's
top_k = 0                               # ours, RLHFlow's

# rank
ranker = "pairrm"                       # ours, see above
ranker_model = "llm-blender/PairRM"     # its public weights
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # ours, see above

# train
loss = "inpo"                           # Eq. 8
eta = 0.005                             # paper, .002 to .1; tau = eta / 3 would mix the reference
lr = 5e-7                               # paper, cosine
warmup = 0.03                           # paper
batch_size = 128                        # paper
