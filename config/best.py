# Past the log, rung 11: rung 10 with the first block's values mixed into all others. The best so far.
value_residual = True  # the change
# as in rung 10
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 12e-3
min_lr = 1.2e-3
optimizer = 'muon'
embedding_norm = True
head_gate = True
muon_heads = True
muon_rms = 0.07
muon_momentum = 0.9
muon_steps = 3
