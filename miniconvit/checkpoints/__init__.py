"""Parameters in files: our own checkpoints, published weights, and .pth files of others."""
