# Past the log, rung 10: rung 9 with Muon on the queries, keys and values of each head by themselves. The best so far.
muon_heads = True  # the change
# as in rung 9
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
value_residual = True
