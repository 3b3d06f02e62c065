"""AIPO on a model of 0.13B parameters without a GPU, for an evening.

Some 50 minutes an iteration on two cores, most of it PairRM (by arithmetic, not measured). Not a
recipe of the paper, nothing in it is tuned; config/tiny.py is the one that shows the effect.
"""
model = "HuggingFaceTB/SmolLM2-135M-Instruct"  # ours
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # AIPO's pool
n_prompts = 128                         # ours: others at each iteration
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours
n_eval = 64                             # ours
iterations = 3                          # ours

# generate
engine = "transformers"                 # ours: runs anywhere
dtype = "float32"                       # ours, for CPUs
n_responses = 4                         # ours; AIPO has 5, which are 20 comparisons instead of 12
temperature = 0.7                       # ours
top_k = 50                              # AIPO's repository
max_new_tokens = 128                    # ours
max_prompt_tokens = 256                 # ours
generate_rows = 64                      # ours

# rank
ranker = "pairrm"                       # AIPO, Sec. 3
ranker_model = "llm-blender/PairRM"     # AIPO, Sec. 3; 1.7 GB in float32
drop_unfinished = False                 # ours: 128 tokens cut most answers

# train
loss = "aipo"                           # AIPO, Eq. 10
beta = 0.1                              # AIPO, Sec. 4.1
alpha = 0.05                            # in AIPO's range
lambda_ = 0.2                           # in AIPO's range
lr = 2e-6                               # ours: few steps
batch_size = 16                         # ours: 8 steps per iteration
max_length = 384                        # 256 + 128
tokens_per_microbatch = 2048            # ours
