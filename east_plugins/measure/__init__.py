"""Measurements on models and masks. Nothing here changes what it measures."""
