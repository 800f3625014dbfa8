# Row 3: row 2 with a learning rate that falls along a cosine. The log: 2.87 2.86 2.85.
lr_schedule = 'cosine'  # the change
# as in row 2
model = 'torch'
n_head = 2
dropout = 0.2
weight_decay = 0.0
grad_clip = 0.5
