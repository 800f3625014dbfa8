# Past the log, rung 9: rung 8 with a shorter memory for Muon.
muon_momentum = 0.9  # the change: 10 steps in place of 20
# as in rung 8
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
