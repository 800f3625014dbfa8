# Past the log, rung 5: rung 4 with each token's embedding scaled to a mean square of 1.
embedding_norm = True  # the change
# as in rung 4
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 6e-3
min_lr = 6e-4
optimizer = 'muon'
