# Run 11: run 8 with 18 layers, all of them wider. 15,669,248 parameters.
# Notebook: 2.32, then stopped; 130 ms/batch.
n_layer = 18  # the change
n_embd = 256  # the change
d_ff = 768  # the change
n_head = 4  # the notebook gives no number; the head width becomes 64
# as in run 8
activation = 'swiglu'
