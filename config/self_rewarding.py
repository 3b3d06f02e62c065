"""Self-Rewarding (arXiv 2401.10020): the policy writes instructions, answers them and judges.

Leaves out: their SFT model and seed tasks (unpublished; Llama-2-70B-chat and UltraFeedback stand
in), the fixed model that writes their instructions (the policy does), dropout .1, early stopping.
70e9 x 16 bytes for all weights do not fit 8 x 80 GB (config/aipo_llama3_70b.py), so adapters.
"""
model = "meta-llama/Llama-2-70b-chat-hf"  # ours; paper: Llama-2-70B after their SFT
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # ours
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 2                          # paper: M2 and M3
processes = 8                           # ours: one node, a process per GPU
engines = 2                             # ours: 138 GB of weights
tensor_parallel = 4                     # ours: so four GPUs each
rank_processes = 2                      # ours: the judge is as large

# generate
engine = "vllm"                         # ours
new_instructions = 5000                 # ours; the paper trains on 3,964 and 6,942 pairs
instruction_temperature = 0.6           # paper, with top_p .9 and 8 shots
n_responses = 4                         # paper
temperature = 0.7                       # paper
top_p = 0.9                             # paper
top_k = 0                               # paper: names none

# rank
ranker = "judge"                        # paper
ranker_model = "policy"                 # paper
judge_mode = "score"                    # paper: 5 additive points; the words are ours
judge_votes = 3                         # paper
pair_rule = "best_worst"                # paper, ties dropped

# train
loss = "dpo"                            # paper
beta = 0.1                              # paper
lr = 1e-6                               # paper, for all weights; falls to 1e-7 there, to 0 here
schedule = "linear"                     # ours
batch_size = 16                         # paper
lora_rank = 16                          # ours, see above
