"use client";

import type { FormEvent } from "react";
import { type Fields, NEW } from "@/lib/tasks";
import { useHydrated } from "@/lib/use-hydrated";

/** The form for a new task. */
export function AddTask({ onAdd }: { onAdd: (fields: Fields) => void }) {
  const isHydrated = useHydrated();

  function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const fields = read(event.currentTarget, NEW);
    if (!fields.title) return;
    onAdd(fields);
    event.currentTarget.reset();
  }

  return (
    <form className="card add" onSubmit={submit}>
      <label>
        <span className="hidden">New task</span>
        <input name="title" placeholder="What is to be done?" maxLength={255} autoComplete="off" required />
      </label>
      <button className="primary" disabled={!isHydrated}>
        Add
      </button>
      <Details task={NEW} />
    </form>
  );
}

/** The form in place of a task. Escape cancels it. */
export function EditTask({
  task,
  onSave,
  onCancel,
}: {
  task: Fields;
  onSave: (fields: Fields) => void;
  onCancel: () => void;
}) {
  return (
    <form
      className="edit"
      aria-label={`Edit ${task.title}`}
      onSubmit={(event) => {
        event.preventDefault();
        onSave(read(event.currentTarget, task));
      }}
      onKeyDown={(event) => event.key === "Escape" && onCancel()}
    >
      <label>
        Title
        <input name="title" defaultValue={task.title} maxLength={255} autoComplete="off" autoFocus required />
      </label>
      <label>
        Notes
        <textarea name="description" defaultValue={task.description ?? ""} maxLength={5000} rows={3} />
      </label>
      <Details task={task} />
      <div className="buttons">
        <button type="button" onClick={onCancel}>
          Cancel
        </button>
        <button className="primary">Save</button>
      </div>
    </form>
  );
}

function Details({ task }: { task: Fields }) {
  return (
    <div className="details">
      <label>
        Priority
        <select name="priority" defaultValue={task.priority ?? ""}>
          <option value="">None</option>
          <option value="high">High</option>
          <option value="medium">Medium</option>
          <option value="low">Low</option>
        </select>
      </label>
      <label>
        Due
        <input name="due_date" type="date" defaultValue={day(task)} />
      </label>
    </div>
  );
}

/** Returns the task with what is in the form. */
function read(form: HTMLFormElement, task: Fields): Fields {
  const data = new FormData(form);
  const text = (name: string) => String(data.get(name) ?? "").trim();
  return {
    ...task,
    title: text("title"),
    description: text("description") || null,
    priority: (text("priority") || null) as Fields["priority"],
    // A day that nobody has touched stays what it was, which may be a time.
    due_date: text("due_date") === day(task) ? task.due_date : text("due_date") || null,
  };
}

function day({ due_date }: Fields): string {
  return due_date?.slice(0, 10) ?? "";
}
