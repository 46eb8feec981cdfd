"""Alembic's entry point. Online it uses the given connection, offline it prints an SQL script."""

from alembic import context

settings = context.config.attributes
metadata = settings.get("metadata")  # only a comparison needs it, an upgrade does not


def is_ours(name: str | None, kind: str, _parents: object) -> bool:
    """Return whether to compare an object. Better Auth's tables may share the database."""
    return kind != "table" or metadata is None or name in metadata.tables


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True)
else:
    context.configure(
        connection=settings["connection"],
        target_metadata=metadata,
        include_name=is_ours,
        compare_server_default=True,
        on_version_apply=settings.get("on_version_apply", ()),
    )
with context.begin_transaction():
    context.run_migrations()
