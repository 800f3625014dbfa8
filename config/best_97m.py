# Past the log: the changes of rung 6 to row 14. What it reaches in an epoch is not measured yet.
n_layer = 23
n_head = 8
n_embd = 512
d_ff = 2048
activation = 'swiglu'
warmup_iters = 100
learning_rate = 6e-3
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
head_gate = True
