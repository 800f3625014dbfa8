# Run 22: run 21 without attention of a token to itself: it attends to earlier tokens only.
exclude_self = True  # the change
# as in run 21
value_residual = True
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 12e-3
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
head_gate = True
muon_rms = 0.05
muon_steps = 3
