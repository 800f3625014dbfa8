# Past the log, rung 6: rung 5 with gates on the attention heads.
head_gate = True  # the change
# as in rung 5
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 6e-3
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
