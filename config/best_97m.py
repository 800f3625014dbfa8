# Past the notebook: run 14 with what runs 16 to 18 change, at 97 M parameters. Its loss after an epoch is not measured.
optimizer = 'muon'  # the change
learning_rate = 6e-3  # the change
min_lr = 6e-4  # the change
embedding_norm = True  # the change
head_gate = True  # the change
# as in run 14
n_layer = 23
n_embd = 512
d_ff = 2048
n_head = 8
activation = 'swiglu'
warmup_iters = 100
