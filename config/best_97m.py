# Past the log: row 14 with what rung 6 ends at. What it reaches in an epoch is not measured yet.
optimizer = 'muon'  # the change
learning_rate = 6e-3  # the change
min_lr = 6e-4  # the change
embedding_norm = True  # the change
head_gate = True  # the change
# as in row 14
n_layer = 23
n_embd = 512
d_ff = 2048
n_head = 8
activation = 'swiglu'
warmup_iters = 100
