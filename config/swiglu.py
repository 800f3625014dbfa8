# Run 8: run 5 with a SwiGLU feed-forward. 2,102,272 parameters. Notebook: 2.60 2.58 2.56; 38 ms/batch.
activation = 'swiglu'  # the change
d_ff = 256  # the change: about as many parameters as runs 9 and 10
