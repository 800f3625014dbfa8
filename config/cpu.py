# An overlay, no row: sizes that make a small row a coffee break on a laptop.
# python train.py config/best.py config/cpu.py
# So short a run of rows 2 to 15 also needs --learning_rate_scale=10. Row 1 and the rungs do not.
batch_size = 6
block_size = 128
max_iters = 2000
log_interval = 100
eval_interval = 1000
