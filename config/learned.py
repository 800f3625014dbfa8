# Row 15: row 13 with learned positions in place of rotary ones.
# The log: 2.58 2.55 2.53.
activation = 'swiglu'
d_ff = 256
position = 'learned'
warmup_iters = 100
learning_rate = 3e-4
