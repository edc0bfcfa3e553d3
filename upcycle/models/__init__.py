"""Facts about architectures: dense and sparse, and which becomes which."""
