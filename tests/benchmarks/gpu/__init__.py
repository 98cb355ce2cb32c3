"""What the path on a GPU does: counted on CPUs, measured where there is a GPU."""
