# Past the log, rung 4: rung 3 at twice the learning rate, which Muon bears.
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 6e-3
min_lr = 6e-4
optimizer = 'muon'
