# Row 14: row 13 with 23 layers, all wider. 97,198,592 parameters.
# The log: 2.23, stopped; 465 ms/batch.
n_layer = 23
n_head = 8
n_embd = 512
d_ff = 2048
activation = 'swiglu'
warmup_iters = 100
learning_rate = 3e-4
