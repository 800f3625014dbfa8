# Row 5: weight decay 0.1 in place of dropout. These are train.py's defaults: there is nothing to change.
# The log: 2.69 2.66 2.64.
