"""The pixel cache: every image decoded once."""
