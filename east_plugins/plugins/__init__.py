"""Growth, prune and redistribution rules: functions that score; the host selects the exact number."""
