"""How ZeRO shards the model, what ranks exchange, and a model of a step on many of them."""
