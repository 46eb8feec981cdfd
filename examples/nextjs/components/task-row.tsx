"use client";

import { useRef, useState } from "react";
import { flushSync } from "react-dom";
import type { Conflict, Row } from "@/lib/rows";
import type { TaskStore } from "@/lib/store";
import type { Fields } from "@/lib/tasks";
import { EditTask } from "./task-form";

const PRIORITIES = { high: "High", medium: "Medium", low: "Low" };

export function TaskRow({ row, store, onRemove }: { row: Row; store: TaskStore; onRemove: () => void }) {
  /** The task when its form was opened. It may change meanwhile. */
  const [edited, setEdited] = useState<Row | null>(null);
  const title = useRef<HTMLButtonElement>(null);

  /** Does what shows the task again, and puts the focus on it. */
  function close(action: () => void) {
    flushSync(() => {
      action();
      setEdited(null);
    });
    title.current?.focus();
  }

  if (edited) {
    const save = (fields: Fields) => close(() => store.change(edited, fields));
    return (
      <li>
        <EditTask task={edited} onSave={save} onCancel={() => close(() => {})} />
      </li>
    );
  }
  const { conflict } = row;
  if (conflict) {
    return (
      <li>
        <Choice
          mine={row}
          conflict={conflict}
          onChoose={(choice) => close(() => store.resolve(row, conflict, choice))}
        />
      </li>
    );
  }
  const isDone = row.status === "complete";
  return (
    <li id={row.key} className={isDone ? "task done" : "task"}>
      <input
        type="checkbox"
        aria-label={`Complete ${row.title}`}
        checked={isDone}
        onChange={() => store.change(row, { status: isDone ? "incomplete" : "complete" })}
      />
      <div className="text">
        <button ref={title} className="title" onClick={() => setEdited(row)}>
          <span className="hidden">Edit </span>
          {row.title}
        </button>
        <Facts task={row} />
      </div>
      <button className="icon" aria-label={`Delete ${row.title}`} onClick={onRemove}>
        <svg viewBox="0 0 16 16" aria-hidden="true">
          <path d="M3 4.5h10M6.5 4V2.5h3V4M4.5 4.5l.5 9h6l.5-9M6.75 7v4M9.25 7v4" />
        </svg>
      </button>
    </li>
  );
}

/** Both versions of a task, of which the user chooses one. */
function Choice({
  mine,
  conflict: { kind, theirs },
  onChoose,
}: {
  mine: Row;
  conflict: Conflict;
  onChoose: (choice: "mine" | "theirs") => void;
}) {
  const showsStatus = mine.status !== theirs?.status;
  return (
    <section className="conflict" role="alert" aria-label={`Two versions of ${mine.title}`}>
      <p>
        <strong>Changed in two places.</strong> Which version stays?
      </p>
      <div className="versions">
        <div>
          <h3>Yours</h3>
          {kind === "delete" ? <p>You have deleted it</p> : <Version task={mine} showsStatus={showsStatus} />}
          <button onClick={() => onChoose("mine")}>Keep yours</button>
        </div>
        <div>
          <h3>The other one</h3>
          {theirs ? <Version task={theirs} showsStatus={showsStatus} /> : <p>It is deleted</p>}
          <button onClick={() => onChoose("theirs")}>Keep the other one</button>
        </div>
      </div>
    </section>
  );
}

function Version({ task, showsStatus }: { task: Fields; showsStatus: boolean }) {
  return (
    <>
      <p className="title">{task.title}</p>
      <Facts task={task} />
      {showsStatus && <p className="facts">{task.status === "complete" ? "Done" : "To do"}</p>}
    </>
  );
}

function Facts({ task }: { task: Fields & { unsent?: boolean } }) {
  const { description, priority, due_date, unsent } = task;
  const isOverdue = due_date !== null && task.status === "incomplete" && isPast(due_date);
  return (
    <>
      {description && <p className="notes">{description}</p>}
      {(priority || due_date || unsent) && (
        <p className="facts">
          {priority && <span className={`priority ${priority}`}>{PRIORITIES[priority]}</span>}
          {due_date && (
            <span className={isOverdue ? "overdue" : undefined}>
              {isOverdue ? "Overdue, " : "Due "}
              <time dateTime={due_date}>{shown(due_date)}</time>
            </span>
          )}
          {unsent && <span className="unsent">Not sent yet</span>}
        </p>
      )}
    </>
  );
}

/** Returns the start of a day here, or the instant of a time. */
function instant(due: string): Date {
  return new Date(due.length === 10 ? `${due}T00:00` : due);
}

function isPast(due: string): boolean {
  const end = instant(due);
  if (due.length === 10) end.setDate(end.getDate() + 1);
  return end.getTime() <= Date.now();
}

function shown(due: string): string {
  const date = instant(due);
  const today = new Date().setHours(0, 0, 0, 0);
  const days = Math.round((new Date(date).setHours(0, 0, 0, 0) - today) / 86_400_000);
  if (days === 0) return "today";
  if (days === 1) return "tomorrow";
  const year = date.getFullYear() === new Date().getFullYear() ? undefined : "numeric";
  return date.toLocaleDateString("en", { weekday: "short", day: "numeric", month: "short", year });
}
