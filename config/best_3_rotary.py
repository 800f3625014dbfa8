# Past the log, rung 3: rung 2 with rotary positions again.
position = 'rotary'  # the change
# as in rung 2
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 3e-3
min_lr = 3e-4
optimizer = 'muon'
