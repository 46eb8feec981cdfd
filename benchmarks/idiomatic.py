"""The baseline: FastAPI, SQLModel's AsyncSession, asyncpg and PyJWT, used as their docs show.

It has the same endpoints, tables and tokens as ours, but no row security. `run.py` starts it.
"""

import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, Header, HTTPException, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, TypeAdapter, computed_field
from sqlalchemy import BigInteger, DateTime, Identity
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel, col, select
from sqlmodel.ext.asyncio.session import AsyncSession

SECRET = os.environ["BETTER_AUTH_SECRET"]
engine = create_async_engine(
    os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:"),
    pool_size=int(os.environ["POOL_SIZE"]),
    max_overflow=0,
)
bearer = HTTPBearer()
app = FastAPI()


def now() -> datetime:
    return datetime.now(UTC)


class TaskBase(SQLModel):
    title: str = Field(max_length=255)
    description: str | None = Field(default=None, max_length=5000)
    status: str = "incomplete"
    priority: str | None = None
    due_date: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))


class Task(TaskBase, table=True):
    __tablename__ = "tasks"

    id: int | None = Field(
        default=None, primary_key=True, sa_type=BigInteger, sa_column_args=(Identity(always=True),)
    )
    user_id: str = Field(primary_key=True)
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    version: int = 1  # this server has no versions, but the column needs a value


class User(SQLModel, table=True):
    __tablename__ = "users"

    id: str = Field(primary_key=True)
    version: int = 1


class TaskCreate(TaskBase):
    pass


class TaskUpdate(BaseModel):
    title: str | None = None
    description: str | None = None
    status: str | None = None
    priority: str | None = None
    due_date: datetime | None = None


class TaskPublic(TaskBase):
    id: int
    user_id: str
    created_at: datetime
    updated_at: datetime

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice
    @property
    def completed(self) -> bool:
        return self.status == "complete"


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session


def get_current_user(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)],
) -> str:
    try:
        claims = jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"])
    except jwt.InvalidTokenError as error:
        raise HTTPException(401, "Could not validate credentials") from error
    return str(claims["sub"])


SessionDep = Annotated[AsyncSession, Depends(get_session)]
CurrentUser = Annotated[str, Depends(get_current_user)]


async def get_own_task(task_id: int, session: SessionDep, user_id: CurrentUser) -> Task:
    found = await session.exec(select(Task).where(Task.id == task_id, Task.user_id == user_id))
    task = found.first()
    if task is None:
        raise HTTPException(404, "Task not found")
    return task


OwnTask = Annotated[Task, Depends(get_own_task)]


@app.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@app.get("/api/tasks", response_model=list[TaskPublic])
async def list_tasks(session: SessionDep, user_id: CurrentUser) -> list[Task]:
    tasks = await session.exec(
        select(Task)
        .where(Task.user_id == user_id)
        .order_by(col(Task.created_at).desc(), col(Task.id).desc())
    )
    return list(tasks.all())


@app.get("/api/conditional")
async def list_if_changed(
    session: SessionDep, user_id: CurrentUser, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    tasks = [TaskPublic.model_validate(task) for task in await list_tasks(session, user_id)]
    body = TypeAdapter(list[TaskPublic]).dump_json(tasks)
    headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
    if headers["ETag"] == if_none_match:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")


@app.post("/api/tasks", response_model=TaskPublic, status_code=201)
async def create_task(task: TaskCreate, session: SessionDep, user_id: CurrentUser) -> Task:
    if await session.get(User, user_id) is None:
        session.add(User(id=user_id))
        await session.flush()
    created = Task.model_validate(task, update={"user_id": user_id})
    session.add(created)
    await session.commit()
    return created


@app.get("/api/tasks/{task_id}", response_model=TaskPublic)
async def get_task(task: OwnTask) -> Task:
    return task


@app.put("/api/tasks/{task_id}", response_model=TaskPublic)
async def update_task(change: TaskUpdate, task: OwnTask, session: SessionDep) -> Task:
    task.sqlmodel_update(change.model_dump(exclude_unset=True))
    task.updated_at = now()
    session.add(task)
    await session.commit()
    return task


@app.patch("/api/tasks/{task_id}/complete", response_model=TaskPublic)
async def complete_task(task: OwnTask, session: SessionDep) -> Task:
    task.status = "incomplete" if task.status == "complete" else "complete"
    task.updated_at = now()
    session.add(task)
    await session.commit()
    return task


@app.delete("/api/tasks/{task_id}", status_code=204)
async def delete_task(task: OwnTask, session: SessionDep) -> None:
    await session.delete(task)
    await session.commit()
