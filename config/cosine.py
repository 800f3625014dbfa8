# Row 3: the learning rate falls along a cosine.
# The log: 2.87 2.86 2.85.
model = 'torch'
n_head = 2
optimizer = 'adam'
dropout = 0.2
weight_decay = 0.0
