"""Pure functions of the step: prune rate and global density."""
