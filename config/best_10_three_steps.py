# Past the log, rung 10: rung 9 with three steps of orthogonalisation in place of five.
muon_steps = 3  # the change
# as in rung 9
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
