# Row 15: row 13 with learned positions in place of rotary ones. The log: 2.58 2.55 2.53.
position = 'learned'  # the change
# as in row 13
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 3e-4
