"""The decoder one block at a time: its forward pass, its activation streams, its durable results."""
