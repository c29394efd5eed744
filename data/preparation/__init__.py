"""Checks and reports of data.data_preprocess."""
