"""What this machine and this installation offer, and what the engine will choose on them."""
