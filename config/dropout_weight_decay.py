# Row 6: row 5 with dropout as well.
# The log has no numbers: "better than dropout without weight decay, but worse than just weight decay".
dropout = 0.2  # the change
