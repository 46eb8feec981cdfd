"""Alembic's entry: online on the connection it is handed, offline as an SQL script."""

from alembic import context

settings = context.config.attributes
metadata = settings.get("metadata")  # only to compare with: an upgrade needs none


def is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Leave alone what else lives in the database: Better Auth may share it."""
    return kind != "table" or metadata is None or name in metadata.tables


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True)
else:
    context.configure(
        connection=settings["connection"],
        target_metadata=metadata,
        include_name=is_ours,
        compare_server_default=True,
    )
with context.begin_transaction():
    context.run_migrations()
