"""Parts of train_long.py: the processes, the model on a part of each sequence, the training loop, the figure."""
