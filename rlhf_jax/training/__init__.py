"""What stands around a run on the host: its folder, its metrics file, a progress bar, checkpoints."""
