# Run 20: run 19 with three steps of Muon's orthogonalisation in place of five.
muon_steps = 3  # the change
# as in run 19
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 12e-3
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
head_gate = True
muon_rms = 0.05
