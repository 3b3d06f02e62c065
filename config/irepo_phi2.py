"""iREPO (arXiv 2405.15230) on Phi-2 after SFT on UltraChat.

Its full text was not available: "log" is the authors' training log, the rest is ours. Iteration 0
is offline, on UltraFeedback's own pairs; the others start from its model:
    --candidates=HuggingFaceH4/ultrafeedback_binarized:train_prefs --iterations=1 --out=out/irepo_0
    --model=out/irepo_0/iter_1/model
Leaves out: its nine annotators, which are unpublished; nine votes of PairRM, split by its
probability, stand in.
"""
model = "lole25/phi-2-sft-ultrachat-full"  # ours: public, UltraChat; theirs in ChatML (log)
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # log
n_prompts = 30000                       # log: iteration 1
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 2                          # log: 1 and 2, after the offline 0
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # ours; D is unknown
temperature = 0.7                       # ours, unknown
max_new_tokens = 1024                   # ours: Phi-2's window is 2,048

# rank
ranker = "annotators"                   # votes on every pair, Bradley-Terry strengths (review)
ranker_model = "pairrm:llm-blender/PairRM"  # ours, see above
annotator_votes = 9                     # nine annotators (review)
pseudo_count = 0.5                      # ours
pair_rule = "best_worst"                # strongest against weakest (review)

# train
loss = "irepo"                          # Eq. 16
beta = 0.1                              # ours, unknown
z_clip = 4.0                            # ours; the log's first losses suggest .1 to .25
lr = 5e-6                               # log, cosine with 10 % warm-up, one epoch
batch_size = 32                         # log
seed = 42                               # log
lora_rank = 16                          # log: LoRA, merged between iterations; the rank is ours
lora_alpha = 16.0                       # ours
max_length = 2048                       # Phi-2's window
