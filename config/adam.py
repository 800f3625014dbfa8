# Run 2: run 1 with Adam in place of SGD. Notebook: 2.87 2.87 2.86.
optimizer = 'adamw'  # the change; with the weight decay of 0 below, AdamW is Adam
learning_rate = 1e-4  # the change: 5.0 would move every weight by about 5 in each step
# as in run 1
model = 'torch'
n_head = 2
lr_schedule = 'constant'
dropout = 0.2
weight_decay = 0.0
grad_clip = 0.5
