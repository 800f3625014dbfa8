# Run 14: run 13 with 23 layers, all of them wider. 97,198,592 parameters.
# Notebook: 2.23, then stopped; 465 ms/batch.
n_layer = 23  # the change
n_embd = 512  # the change
d_ff = 2048  # the change
n_head = 8  # the notebook gives no number; the head width becomes 64
# as in run 13
activation = 'swiglu'
warmup_iters = 100
learning_rate = 3e-4
