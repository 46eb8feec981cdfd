"""Who is asking: tokens, keys and the owner they prove."""
