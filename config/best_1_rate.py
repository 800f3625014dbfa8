# Past the log, rung 1: row 15 at ten times the learning rate, which falls to a tenth of itself, not to 0.
learning_rate = 3e-3  # the change
min_lr = 3e-4  # the change
# as in row 15
activation = 'swiglu'
d_ff = 256
position = 'learned'
warmup_iters = 100
