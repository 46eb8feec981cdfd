"""The product: one user's tasks, from the table to the route."""
