# Past the log, rung 7: rung 6 with Muon on the queries, keys and values of each head by themselves.
muon_heads = True  # the change
# as in rung 6
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 6e-3
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
head_gate = True
