# Not a run but an overlay: put after a run's config, it cuts the sizes to a short run, minutes on a laptop.
# python train.py config/swiglu.py config/cpu.py --learning_rate_scale=3
# Runs 2 to 15 need that factor, since 2,000 steps are few for the notebook's learning rates; the others do without.
batch_size = 6
block_size = 128
max_iters = 2000
log_interval = 100
eval_interval = 1000
