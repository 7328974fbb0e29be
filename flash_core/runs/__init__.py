"""What every training run needs: random streams, learning rates, averages of weights, copies to a device."""
