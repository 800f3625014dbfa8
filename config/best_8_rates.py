# Past the log, rung 8: rung 7 with longer steps for AdamW, and shorter ones for Muon.
learning_rate = 12e-3  # the change
min_lr = 1.2e-3  # the change
muon_rms = 0.07  # the change: with the higher rate, 0.7 of the step before
# as in rung 7
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
optimizer = 'muon'
embedding_norm = True
head_gate = True
muon_heads = True
