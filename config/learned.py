# Run 15: run 13 with learned positions in place of rotary ones. Notebook: 2.58 2.55 2.53.
position = 'learned'  # the change
# as in run 13
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
learning_rate = 3e-4
