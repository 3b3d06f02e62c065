"""iLR-DPO (arXiv 2406.11817): length-regularised DPO, iterated, on openchat-3.5-0106.

Most of it is unpublished. Leaves out: Starling-RM-34B, whose own code we do not run (a reward model
of ours stands in). Nectar's prompts carry their own "Human:" marks.
"""
model = "openchat/openchat-3.5-0106"    # paper
prompts = "berkeley-nest/Nectar:train"  # paper
n_prompts = 20000                       # unpublished; ours
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 3                          # paper
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # unpublished; ours
temperature = 0.7                       # unpublished; ours
top_k = 0                               # unpublished; ours

# rank
ranker = "reward"                       # paper: Starling-RM-34B
ranker_model = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # ours, a stand-in: see above
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # unpublished; ours

# train
loss = "rdpo"                           # paper; 2403.19159 Eq. 9
beta = 0.1                              # unpublished; ours, R-DPO's .01 to .1
alpha = 0.05                            # unpublished; ours: nats a token, 200 are beta x 100
lr = 5e-7                               # unpublished; AIPO's
batch_size = 128                        # unpublished; ours
