"""A multi-user to-do REST API: one request, one owner, one statement, one round trip."""
