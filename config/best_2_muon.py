# Past the log, rung 2: rung 1 with Muon for the matrices of the layers; AdamW keeps the rest.
optimizer = 'muon'  # the change
# as in rung 1
activation = 'swiglu'
d_ff = 256
position = 'learned'
warmup_iters = 100
learning_rate = 3e-3
min_lr = 3e-4
