"""Do linear probes find shared and private factors in z? Ours against a common latent space. See `__main__`."""
