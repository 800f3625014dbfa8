# Row 2: Adam in place of SGD.
# The log: 2.87 2.87 2.86.
model = 'torch'
n_head = 2
optimizer = 'adam'
lr_schedule = 'constant'
dropout = 0.2
weight_decay = 0.0
