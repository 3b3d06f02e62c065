"""sDPO (arXiv 2403.19270): DPO on one data set after the other.

The reference is the policy before. The paper's sets: OpenOrca 12K, then UltraFeedback-cleaned 60K.
pairs/orca.jsonl: the 12K of OpenOrca as prompt, chosen, rejected; make it from Intel/orca_dpo_pairs
(its column question is the prompt).
Leaves out: splitting the data from easy to hard by the base model's own accuracy; the order of the
two sets is the paper's. The stand-in has seen both kinds of data in its own alignment, so what it
gains here says little.
"""
model = "upstage/SOLAR-10.7B-Instruct-v1.0"  # ours, a stand-in; paper: SOLAR-10.7B after SFT only
pairs = "pairs/orca.jsonl argilla/ultrafeedback-binarized-preferences-cleaned:train"  # paper
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 2                          # paper: one per data set
processes = 8                           # ours: one node, a process per GPU
engine = "vllm"                         # ours, for the evaluation

# train
loss = "dpo"                            # paper
beta = 0.1                              # ours, not in our notes
lr = 5e-7                               # paper: as Zephyr; the number is ours
batch_size = 128                        # ours, not in our notes
max_length = 2560                       # ours
