# Run 16: run 13 with Muon for the hidden weight matrices; AdamW keeps the embeddings, the biases and the norms' gains.
optimizer = 'muon'  # the change
learning_rate = 3e-3  # the change: a learning rate that suits Muon in short runs
min_lr = 3e-4  # the change: the cosine ends at a tenth of its peak, nanoGPT's rule
# as in run 13
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
