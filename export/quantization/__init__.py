"""From float weights to integers and scales, and their torch twin."""
