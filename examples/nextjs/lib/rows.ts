// What the user sees: the tasks of the service, with the user's writes on top.
import { type Fields, NEW, type Task } from "./tasks";
import type { Edit, Id, Write } from "./writes";

export type Row = Fields & {
  /** Stays the same when the service gives the task its id. */
  key: string;
  id: Id;
  version: number;
  created_at: string;
  unsent: boolean;
  conflict?: Conflict;
};

/** What the service has in place of what an edit expects: null if the task is deleted there. */
export type Conflict = { write: string; kind: Edit["kind"]; theirs: Task | null };

export class Rows {
  #rows = new Map<Id, Row>();

  /** @param keys of the tasks that were created on this device, by their ids */
  constructor(tasks: Iterable<Task>, keys: Map<number, string>) {
    for (const task of tasks) {
      const key = keys.get(task.id) ?? String(task.id);
      this.#rows.set(task.id, { ...task, key, unsent: false });
    }
  }

  list(): Row[] {
    return [...this.#rows.values()];
  }

  remove(id: Id): void {
    this.#rows.delete(id);
  }

  /** Shows a write of the task with this id. */
  apply(write: Write, id: Id, unsent: boolean): void {
    const row = this.#rows.get(id);
    if (write.kind === "create") {
      const { fields, key, created_at } = write;
      if (!row) this.#rows.set(id, { ...fields, id, key, version: 0, created_at, unsent });
    } else if (write.kind === "delete") {
      this.#rows.delete(id);
    } else if (row) {
      this.#rows.set(id, { ...row, ...write.fields, unsent: unsent || row.unsent });
    }
  }

  /** Shows the user's version of a task beside that of the service. */
  showConflict(write: Edit, id: Id, theirs: Task | null): void {
    const { kind, before, fields, version } = write;
    const gone = { ...NEW, ...before, id, key: String(id), version, created_at: "", unsent: false };
    const row = this.#rows.get(id) ?? gone;
    this.#rows.set(id, { ...row, ...fields, conflict: { write: write.key, kind, theirs } });
  }
}
