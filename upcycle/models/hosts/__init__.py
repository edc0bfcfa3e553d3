"""Facts of the hosts, a file a family."""
