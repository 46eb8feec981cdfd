"""Everything about PostgreSQL: the connections, the schema, and a private server."""
