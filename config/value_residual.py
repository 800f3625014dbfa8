# Run 21: run 20 with the first block's attention values mixed into those of all others.
value_residual = True  # the change
# as in run 20
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
