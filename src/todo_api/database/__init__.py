"""The one way to PostgreSQL, and a private one where none is given."""
