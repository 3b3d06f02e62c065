"""SimPO (arXiv 2405.14734), on-policy, on Llama-3-8B-Instruct, labels by ArmoRM (v0.2).

Leaves out ArmoRM, whose own code we do not run; Skywork/Skywork-Reward-Llama-3.1-8B-v0.2 stands in.
"""
model = "meta-llama/Meta-Llama-3-8B-Instruct"  # paper
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # paper
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # paper: one pass
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # paper: five seeds
temperature = 0.8                       # paper
top_p = 0.95                            # paper
top_k = 0                               # paper: names none
max_prompt_tokens = 1800                # paper: 1,800 in 2,048

# rank
ranker = "reward"                       # repository: ArmoRM
ranker_model = "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"  # ours, a stand-in: see above
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper

# train
loss = "simpo"                          # Eq. 6
beta = 10.0                             # paper
gamma = 3.0                             # paper: gamma / beta = 0.3
lr = 1e-6                               # paper, cosine with 10 % warm-up
batch_size = 128                        # paper
max_length = 2048                       # paper; longer pairs are dropped here
epochs = 1                              # paper
