# Run 7: run 5 with an exponential moving average of the weights. Notebook: 2.66 2.63 2.62, the average the same.
ema_decay = 0.999  # the change; the notebook gives no decay, this is our choice
