"""Trained models on images: detector, scores, evidence."""
