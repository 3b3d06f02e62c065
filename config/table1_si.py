"""AIPO's Table 1 (arXiv 2409.08845), row PairRM(Gen(SI(UF))).

Own responses to own instructions, written after UltraFeedback's; one pass of DPO.
"""
model = "mistralai/Mistral-7B-Instruct-v0.2"  # Tab. 1
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # Tab. 1, the pool of self-instruct
new_instructions = 20000                # Sec. 4.2's number; the table's is not in our notes
min_prompt_tokens = 3                   # of an instruction (repository)
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # Tab. 1: one pass
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # N (Sec. 3)
temperature = 0.4                       # repository default, the paper is silent
top_k = 50                              # repository
max_new_tokens = 2048                   # repository
max_prompt_tokens = 512                 # templated prompt (repository)

# rank
ranker = "pairrm"                       # Tab. 1
ranker_model = "llm-blender/PairRM"     # Sec. 3
rank_batch_tokens = 16384               # ours, for GPUs of 80 GB
pair_rule = "best_worst"                # paper or repository
max_response_tokens = 2016              # repository

# train
loss = "dpo"                            # Tab. 1
beta = 0.1                              # searched .1, .5, 1; the table's is not in our notes
lr = 5e-7                               # Sec. 4.1, cosine with 10 % warm-up, one epoch
batch_size = 128                        # Sec. 4.1
max_length = 2560                       # 512 + 2048 (repository)
tokens_per_microbatch = 8192            # ours, for GPUs of 80 GB
compile = True                          # ours: 1.4 times as fast on an H100
