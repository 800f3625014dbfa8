# Run 1: PyTorch's tutorial model, trained by SGD. 1,863,025 parameters.
# Notebook: 3.03 3.02 2.96 (validation loss in nats per token after epochs 1, 2, 3).
model = 'torch'
n_head = 2
optimizer = 'sgd'
learning_rate = 5.0
lr_schedule = 'constant'
dropout = 0.2
weight_decay = 0.0
grad_clip = 0.5  # the tutorial's
