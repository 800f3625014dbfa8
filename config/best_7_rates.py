# Past the log, rung 7: rung 6 with longer steps for AdamW, and shorter ones for Muon.
learning_rate = 12e-3  # the change
muon_rms = 0.05  # the change: with the higher rate, half of the step before
# as in rung 6
activation = 'swiglu'
d_ff = 256
warmup_iters = 100
min_lr = 6e-4
optimizer = 'muon'
embedding_norm = True
head_gate = True
