# Run 9: run 5 with 8 layers. 2,142,800 parameters. Notebook: 2.62 2.59, then stopped; 48.5 ms/batch.
n_layer = 8  # the change
