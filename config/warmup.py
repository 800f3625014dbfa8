# Run 12: run 8 with warmup. Notebook: 2.59 2.57 2.56.
warmup_iters = 100  # the change; the notebook gives no number of steps, this is our choice
# as in run 8
activation = 'swiglu'
d_ff = 256
