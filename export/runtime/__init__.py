"""Packages loaded and run: decoding, sampling, text, speed."""
