# Run 19: run 18 with four times the learning rate for AdamW's part, mostly the embeddings. Muon's step stays as it was.
learning_rate = 12e-3  # the change
min_lr = 6e-4  # the change
muon_rms = 0.05  # the change: a quarter of 0.2, so that Muon's step at the peak is that of run 18
# as in run 18
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
optimizer = 'muon'
embedding_norm = True
head_gate = True
