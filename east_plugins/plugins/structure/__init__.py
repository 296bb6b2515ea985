"""Structures: how active weights lie in a layer, and which of them an update takes."""
