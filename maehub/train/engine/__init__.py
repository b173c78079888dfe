"""What every training loop stands on: processes, precision, optimizer, checkpoints, logs."""
