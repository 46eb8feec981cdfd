"use client";

import { useDeferredValue, useEffect, useRef, useState, useSyncExternalStore } from "react";
import { flushSync } from "react-dom";
import { createCall } from "@/lib/api";
import type { Row } from "@/lib/rows";
import { EMPTY, type Snapshot, TaskStore } from "@/lib/store";
import { arrange, ORDERS, STATUSES, type View } from "@/lib/tasks";
import { Account, type User } from "./account";
import { AddTask } from "./task-form";
import { TaskRow } from "./task-row";

const PAGE = 25;
const UNDO_SECONDS = 8;
const EVERYTHING: View = { words: "", status: "all", order: "created" };

export function Tasks({ user, apiUrl }: { user: User; apiUrl: string }) {
  const [store] = useState(
    () => new TaskStore(createCall(apiUrl, user.id), user.id, () => location.reload()),
  );
  useEffect(() => store.start(), [store]);
  const snapshot = useSyncExternalStore(store.subscribe, store.snapshot, () => EMPTY);

  return (
    <>
      <header>
        <h1 className="brand">To do</h1>
        <Connection {...snapshot} />
        <Account user={user} store={store} unsent={snapshot.unsent} />
      </header>
      <main>
        <Offline {...snapshot} />
        <AddTask onAdd={(fields) => store.add(fields)} />
        <Problems store={store} snapshot={snapshot} />
        <List store={store} snapshot={snapshot} />
      </main>
      <Deleted store={store} row={snapshot.deleted} />
    </>
  );
}

function Connection({ connection }: Snapshot) {
  const text = { starting: "Connecting…", live: "Live", offline: "Offline" }[connection];
  return (
    <p className={`connection ${connection}`} role="status">
      {text}
    </p>
  );
}

function Offline({ connection, reason, unsent }: Snapshot) {
  const kept = unsent === 1 ? "1 change is kept here" : `${unsent} changes are kept here`;
  const hope = unsent > 0 ? `${kept} and sent later.` : "You can go on, and changes are sent later.";
  return (
    <p className="notice" role="status">
      {connection === "offline" && `${reason}. ${hope}`}
    </p>
  );
}

function Problems({ store, snapshot }: { store: TaskStore; snapshot: Snapshot }) {
  return (
    <div role="alert">
      {snapshot.problems.map((problem) => (
        <p key={problem.key} className="card problem">
          “{problem.title}” was not saved: {problem.message}
          <button onClick={() => store.dismiss(problem)}>Dismiss</button>
        </p>
      ))}
    </div>
  );
}

function List({ store, snapshot }: { store: TaskStore; snapshot: Snapshot }) {
  const { rows, connection } = snapshot;
  const [view, setView] = useState(EVERYTHING);
  const [limit, setLimit] = useState(PAGE);
  const list = useRef<HTMLUListElement>(null);
  const found = arrange(rows, useDeferredValue(view));
  const open = rows.filter(({ status }) => status === "incomplete").length;

  function look(change: Partial<View>) {
    setView({ ...view, ...change });
    setLimit(PAGE);
  }

  function focusTask(index: number) {
    const { children } = list.current!;
    focusOn(children[Math.min(index, children.length - 1)]);
  }

  function remove(row: Row, index: number) {
    flushSync(() => store.remove(row));
    focusTask(index);
  }

  function showMore() {
    flushSync(() => setLimit(limit + PAGE));
    focusTask(limit);
  }

  return (
    <section aria-labelledby="list-title">
      <h2 id="list-title" className="hidden" tabIndex={-1}>
        Your tasks
      </h2>
      {rows.length > 0 && <Toolbar view={view} onChange={look} />}
      <p className="count" role="status">
        {rows.length > 0 && `${open} to do, ${rows.length - open} done`}
        {found.length < rows.length && `, ${found.length} shown`}
      </p>
      <ul ref={list} className="card list">
        {found.slice(0, limit).map((row, index) => (
          <TaskRow key={row.key} row={row} store={store} onRemove={() => remove(row, index)} />
        ))}
      </ul>
      {found.length > limit && (
        <button className="more" onClick={showMore}>
          Show {Math.min(PAGE, found.length - limit)} more
        </button>
      )}
      {rows.length === 0 && <Nothing connection={connection} />}
      {rows.length > 0 && found.length === 0 && (
        <div className="nothing">
          <p>No task matches.</p>
          <button onClick={() => setView({ ...EVERYTHING, order: view.order })}>Show all tasks</button>
        </div>
      )}
    </section>
  );
}

function Nothing({ connection }: { connection: Snapshot["connection"] }) {
  const texts = {
    starting: ["Your tasks are on their way…", ""],
    live: ["Nothing to do", "Write down what is on your mind."],
    offline: ["Your tasks are not on this device yet", "They appear when the server answers."],
  };
  const [title, hint] = texts[connection];
  return (
    <div className="nothing">
      <p className="title">{title}</p>
      <p>{hint}</p>
    </div>
  );
}

function Toolbar({ view, onChange }: { view: View; onChange: (change: Partial<View>) => void }) {
  return (
    <div className="toolbar" role="search">
      <label className="search">
        <span className="hidden">Search</span>
        <input
          type="search"
          placeholder="Search"
          value={view.words}
          onChange={(event) => onChange({ words: event.target.value })}
        />
      </label>
      <fieldset className="filter">
        <legend className="hidden">Show</legend>
        {Object.entries(STATUSES).map(([status, label]) => (
          <label key={status}>
            <input
              type="radio"
              name="status"
              checked={view.status === status}
              onChange={() => onChange({ status: status as View["status"] })}
            />
            {label}
          </label>
        ))}
      </fieldset>
      <label className="order">
        <span className="hidden">Order</span>
        <select
          value={view.order}
          onChange={(event) => onChange({ order: event.target.value as View["order"] })}
        >
          {Object.entries(ORDERS).map(([order, label]) => (
            <option key={order} value={order}>
              {label}
            </option>
          ))}
        </select>
      </label>
    </div>
  );
}

/** The last deletion, which the user can undo for a while: longer, if they look at it. */
function Deleted({ store, row }: { store: TaskStore; row: Row | null }) {
  const [isLookedAt, setIsLookedAt] = useState(false);

  useEffect(() => {
    if (!row || isLookedAt) return;
    const timer = setTimeout(store.deleteForGood, UNDO_SECONDS * 1000);
    return () => clearTimeout(timer);
  }, [store, row, isLookedAt]);

  function close(action: () => void) {
    flushSync(() => {
      action();
      setIsLookedAt(false);
    });
    focusOn(document.getElementById(row?.key ?? ""));
  }

  return (
    <div
      className="toast"
      role="status"
      onPointerEnter={() => setIsLookedAt(true)}
      onPointerLeave={() => setIsLookedAt(false)}
      onFocus={() => setIsLookedAt(true)}
      onBlur={() => setIsLookedAt(false)}
    >
      {row && (
        <>
          <p>Deleted “{row.title}”</p>
          <button onClick={() => close(store.undo)}>Undo</button>
          <button className="icon" aria-label="Dismiss" onClick={() => close(store.deleteForGood)}>
            <svg viewBox="0 0 16 16" aria-hidden="true">
              <path d="m4 4 8 8m0-8-8 8" />
            </svg>
          </button>
        </>
      )}
    </div>
  );
}

/** Puts the focus on a task, or on the heading of the list, so that it does not get lost. */
function focusOn(task: Element | null | undefined): void {
  const title = task?.querySelector<HTMLElement>("button.title");
  (title ?? document.getElementById("list-title"))?.focus();
}
