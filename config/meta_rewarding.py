"""Meta-Rewarding (arXiv 2407.19594) on Llama-3-8B-Instruct. What we know of it is second-hand.

Leaves out: the judge of judges (the policy is trained on answers only), their prompts
(UltraFeedback stands in), their tiers (ours: --tier).
"""
model = "meta-llama/Meta-Llama-3-8B-Instruct"  # second-hand
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # ours
n_prompts = 5000                        # second-hand: 5K of 20K
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 4                          # second-hand
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 7                         # second-hand
temperature = 0.8                       # second-hand
top_p = 0.95                            # second-hand
top_k = 0                               # second-hand: names none

# rank
ranker = "judge"                        # second-hand
ranker_model = "policy"                 # second-hand
judge_mode = "score"                    # second-hand; the words are ours
judge_votes = 11                        # second-hand
pair_rule = "short_long"                # second-hand: shortest of the top, longest of the bottom
tier = 0.2                              # ours

# train
loss = "dpo"                            # second-hand
beta = 0.1                              # second-hand
lr = 5e-6                               # second-hand, cosine
batch_size = 32                         # second-hand
epochs = 10                             # second-hand
