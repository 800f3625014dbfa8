# Past the log, rung 4: rung 3 at twice the learning rate, which Muon bears.
learning_rate = 6e-3  # the change
min_lr = 6e-4  # the change
# as in rung 3
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
optimizer = 'muon'
