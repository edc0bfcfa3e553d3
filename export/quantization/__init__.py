"""From float weights to integers and scales, and the twin that computes with them."""
