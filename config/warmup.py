# Row 12: row 8 with warmup.
# The log: 2.59 2.57 2.56.
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
