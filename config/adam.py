# Row 2: row 1 with Adam in place of SGD. The log: 2.87 2.87 2.86.
optimizer = 'adamw'  # the change; with the weight decay of 0 below, AdamW is Adam
learning_rate = 1e-4  # the change: SGD's 5.0 is far too high for Adam
# as in row 1
model = 'torch'
n_head = 2
lr_schedule = 'constant'
dropout = 0.2
weight_decay = 0.0
grad_clip = 0.5
