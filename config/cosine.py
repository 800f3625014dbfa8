# Run 3: run 2 with a learning rate that falls to 0 along a cosine. Notebook: 2.87 2.86 2.85.
lr_schedule = 'cosine'  # the change
# as in run 2
model = 'torch'
n_head = 2
dropout = 0.2
weight_decay = 0.0
grad_clip = 0.5
