"""What every training run needs: random streams, learning rates, the average of the weights."""
