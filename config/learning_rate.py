# Run 13: run 12 at three times the learning rate. Notebook: 2.59 2.57 2.54.
learning_rate = 3e-4  # the change
# as in run 12
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
