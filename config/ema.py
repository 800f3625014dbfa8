# Row 7: row 5 with an exponential moving average of the weights. The log: 2.66 2.63 2.62, and the same for the average.
ema_decay = 0.999  # the change; the log gives no decay, this is our choice
