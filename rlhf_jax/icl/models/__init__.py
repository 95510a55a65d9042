"""Models that read a prompt: linear attention in several forms, softmax and ReLU attention, a small transformer."""
