# An overlay, no row: makes a small row a coffee break on a laptop. python train.py config/swiglu.py config/cpu.py
batch_size = 6
block_size = 128
max_iters = 2000
learning_rate = 3e-3
warmup_iters = 100
log_interval = 100
eval_interval = 1000
