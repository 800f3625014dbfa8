# Row 12: row 8 with warmup. The log: 2.59 2.57 2.56.
warmup_iters = 100  # the change; the log gives no number of steps, this is our choice
# as in row 8
activation = 'swiglu'
d_ff = 256
