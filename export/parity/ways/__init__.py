"""Every way of feeding a package: prefill, decoding, padding, long rows."""
