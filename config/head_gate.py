# Run 18: run 17 with gates on the attention heads.
head_gate = True  # the change
# as in run 17
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 3e-3
min_lr = 3e-4
optimizer = 'muon'
embedding_norm = True
