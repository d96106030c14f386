"""From a gradient to a trained model: optimizers, the loop, and worker processes."""
