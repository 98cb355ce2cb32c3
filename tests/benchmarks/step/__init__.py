"""Is a training step, and is encoding, faster than the reference's?"""
