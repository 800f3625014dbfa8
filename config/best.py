# Run 23: run 22 with two induction heads, which find each token's value by the key of the token before it.
induction_heads = 2  # the change
# as in run 22
exclude_self = True
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
