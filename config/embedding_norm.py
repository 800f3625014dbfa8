# Run 17: run 16 with each token's embedding scaled to a mean square of 1.
embedding_norm = True  # the change
# as in run 16
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 3e-3
min_lr = 3e-4
optimizer = 'muon'
