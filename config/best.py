# Past the log, rung 9: rung 8 with the first block's values mixed into all others. The best so far.
value_residual = True  # the change
# as in rung 8
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
