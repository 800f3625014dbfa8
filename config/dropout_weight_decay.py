# Run 6: run 5 with dropout as well.
# Notebook, without numbers: "better than dropout without weight decay, but worse than just weight decay".
dropout = 0.2  # the change
