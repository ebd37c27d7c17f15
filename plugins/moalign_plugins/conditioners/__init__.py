"""How a preference reaches one model that is trained for many of them."""
