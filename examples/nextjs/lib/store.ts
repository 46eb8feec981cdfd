// One user's tasks in one window: a copy of the service's, and the writes it does not have yet.
//
// A loop sends the writes, then asks the service for changes and waits for them. What the user sees
// is the copy with the writes on top. Both are in `localStorage`, so they survive a reload, and all
// windows of the user share the writes.
import { type Answer, type Call, Refused, SignedOut, Unreachable } from "./api";
import { differences, type Fields, FIELDS, namesOf, pick, type Task } from "./tasks";

/** The id of a task, or the key of the write that creates it. */
type Id = number | string;

/** What to do, what the user saw before, and a key by which the service does it once. */
type Write = { key: string; order: number; id: Id } & (
  | { kind: "create"; fields: Fields; created_at: string }
  | { kind: "change" | "delete"; fields: Partial<Fields>; before: Partial<Fields>; version: number }
);

type Edit = Extract<Write, { kind: "change" | "delete" }>;

export type Row = Fields & {
  key: string;
  id: Id;
  version: number;
  created_at: string;
  unsent: boolean;
  conflict?: Conflict;
};

/** An edit of something that somebody else has changed meanwhile, or deleted. */
export type Conflict = { write: string; kind: Edit["kind"]; mine: Fields; theirs: Task | null };

export type Problem = { key: string; title: string; message: string };

export type Snapshot = {
  rows: readonly Row[];
  connection: "starting" | "live" | "offline";
  reason: string;
  unsent: number;
  deleted: Row | null;
  problems: readonly Problem[];
};

export const EMPTY: Snapshot = {
  rows: [],
  connection: "starting",
  reason: "",
  unsent: 0,
  deleted: null,
  problems: [],
};

const LONGEST_PAUSE = 4;
const WAIT = 30;

export class TaskStore {
  #tasks = new Map<number, Task>();
  #cursor: string | undefined;
  #writes: Write[] = [];
  /** Writes that the service has, and the copy not yet. */
  #sent: { write: Write; task?: Task }[] = [];
  /** The ids of created tasks by the keys of their writes. */
  #made = new Map<string, number>();
  #conflicts = new Map<string, Task | null>();
  #problems: Problem[] = [];
  /** What the user has deleted, and can bring back. */
  #deleted: Row | null = null;
  #connection: Snapshot["connection"] = "starting";
  #reason = "";
  #wake = new AbortController();
  #stopped = new AbortController();
  #channel: BroadcastChannel | undefined;
  #listeners = new Set<() => void>();
  #snapshot = EMPTY;

  constructor(
    private readonly call: Call,
    private readonly userId: string,
    private readonly onSignedOut: () => void,
  ) {}

  /** Begins to follow the service. Returns a function that ends it. */
  start(): () => void {
    this.#stopped = new AbortController();
    const { signal } = this.#stopped;
    this.#readCopy();
    this.#readWrites();
    addEventListener("storage", (event) => this.#onStorage(event), { signal });
    for (const name of ["online", "offline"]) {
      addEventListener(name, () => this.#wake.abort(), { signal });
    }
    document.addEventListener("visibilitychange", () => this.#onVisibility(), { signal });
    this.#channel = new BroadcastChannel(this.#name("signed out"));
    this.#channel.onmessage = () => this.#leave();
    this.#changed();
    void this.#run(signal);
    return () => this.#stop();
  }

  #stop(): void {
    this.#stopped.abort();
    this.#wake.abort();
    this.#channel?.close();
  }

  #leave(): void {
    this.#stop();
    this.onSignedOut();
  }

  // ---- What the page reads and does

  subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  snapshot = (): Snapshot => this.#snapshot;

  add(fields: Fields): void {
    const key = crypto.randomUUID();
    const created_at = new Date().toISOString();
    this.#enqueue({ kind: "create", key, order: this.#nextOrder(), id: key, fields, created_at });
  }

  /** Changes a task from what the user saw, which may be older than what the copy has now. */
  change(row: Row, fields: Partial<Fields>): void {
    const changes = differences(fields, row);
    if (namesOf(changes).length === 0) return;
    this.#enqueue(this.#edit("change", row, changes, pick(row, namesOf(changes))));
  }

  /** Hides the task. It is deleted when nobody can undo that any more; see `deleteForGood`. */
  remove(row: Row): void {
    this.deleteForGood();
    this.#deleted = row;
    this.#changed();
  }

  undo = (): void => {
    this.#deleted = null;
    this.#changed();
  };

  deleteForGood = (): void => {
    if (!this.#deleted) return;
    const row = this.#deleted;
    this.#deleted = null;
    this.#enqueue(this.#edit("delete", row, {}, pick(row, FIELDS)));
  };

  /** Ends a conflict: with the user's version, or with that of the service. */
  resolve({ write: key, mine, theirs }: Conflict, choice: "mine" | "theirs"): void {
    const write = this.#writes.find((each): each is Edit => each.key === key && "before" in each);
    this.#conflicts.delete(key);
    if (write) this.#dequeue(write);
    if (choice === "theirs" || !write) return this.#changed();
    if (!theirs) return this.add(pick(mine, FIELDS));
    const before = pick(theirs, namesOf(write.before));
    this.#enqueue({ ...write, before, version: theirs.version });
  }

  dismiss(problem: Problem): void {
    this.#problems = this.#problems.filter((each) => each !== problem);
    this.#changed();
  }

  /** Removes everything of the user from this device. Their other windows notice. */
  forget(): void {
    for (const name of this.#stored("")) localStorage.removeItem(name);
    this.#channel?.postMessage("");
    this.#leave();
  }

  // ---- The loop

  async #run(stopped: AbortSignal): Promise<void> {
    for (let failures = 0; !stopped.aborted; ) {
      this.#wake = new AbortController();
      const { signal } = this.#wake;
      try {
        await this.#sendAll();
        await this.#follow(signal);
        failures = 0;
      } catch (error) {
        if (stopped.aborted) return;
        if (signal.aborted) continue;
        if (error instanceof SignedOut) return this.#leave();
        if (!(error instanceof Unreachable || error instanceof Refused)) throw error;
        this.#connected("offline", error.message);
        const asked = error instanceof Unreachable ? error.seconds : 0;
        await pause(asked || Math.min(2 ** failures++ / 4, LONGEST_PAUSE), signal);
      }
    }
  }

  /** Brings the copy up to date, and waits for changes if it is. */
  async #follow(signal: AbortSignal): Promise<void> {
    await untilVisible(signal);
    for (let more = true; more; ) {
      const live = this.#connection === "live";
      const query = new URLSearchParams(this.#cursor ? { since: this.#cursor } : {});
      if (live) query.set("wait", String(WAIT));
      const path = `/api/tasks/changes?${query}`;
      const { status, body } = await this.call(path, { signal, expected: [410], deadline: WAIT + 15 });
      if (status === 410) {
        this.#tasks.clear();
        this.#cursor = undefined;
        this.#connection = "starting";
        continue;
      }
      for (const { task, deleted } of body.changes) {
        if (task) this.#tasks.set(task.id, task);
        else this.#tasks.delete(deleted);
      }
      this.#cursor = body.cursor;
      more = body.more;
      if (body.changes.length > 0 || !live) this.#storeCopy();
    }
    this.#sent = [];
    this.#connected("live");
  }

  #connected(connection: Snapshot["connection"], reason = ""): void {
    this.#connection = connection;
    this.#reason = reason;
    this.#changed();
  }

  // ---- Sending

  /** Sends the writes in order. One window at a time does, because they share the writes. */
  async #sendAll(): Promise<void> {
    if (this.#writes.length === 0) return;
    await navigator.locks.request(this.#name("sending"), async () => {
      this.#readWrites();
      for (let write = this.#next(); write; write = this.#next()) await this.#send(write);
    });
  }

  /** Returns the first write that does not wait for the user to end a conflict. */
  #next(): Write | undefined {
    const blocked = new Set<Id>();
    return this.#writes.find((write) => {
      const id = this.#idOf(write);
      if (this.#conflicts.has(write.key)) blocked.add(id);
      return !blocked.has(id);
    });
  }

  async #send(write: Write): Promise<void> {
    try {
      if (write.kind === "create") await this.#sendCreation(write);
      else await this.#sendEdit(write);
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const title = write.fields.title ?? this.#row(write.id)?.title ?? "";
      this.#problems = [...this.#problems, { key: write.key, title, message: error.message }];
      this.#dequeue(write);
    }
    this.#changed();
  }

  async #sendCreation(write: Extract<Write, { kind: "create" }>): Promise<void> {
    const answer = await this.#write("POST", "/api/tasks", write, write.fields);
    const { id }: Task = answer.body;
    this.#made.set(write.key, id);
    localStorage.setItem(this.#name(`made/${write.key}`), String(id));
    this.#done(write, answer);
  }

  /** Sends an edit. If the task has changed, sends it again, unless that would overwrite an edit. */
  async #sendEdit(write: Edit): Promise<void> {
    const id = this.#idOf(write);
    if (typeof id === "string") return this.#dequeue(write); // its creation was refused
    for (let newest = this.#newest(id); ; ) {
      // With the version that the user saw, a write that is done already is answered as done, and
      // another one is refused.
      const version = newest && agrees(write, newest) ? newest.version : write.version;
      const method = write.kind === "delete" ? "DELETE" : "PATCH";
      const body = write.kind === "delete" ? undefined : write.fields;
      const answer = await this.#write(method, `/api/tasks/${id}`, write, body, version);
      const isGone = answer.status === 404 && write.kind === "delete";
      if (answer.ok || isGone) return this.#done(write, answer);
      newest = await this.#fetch(id);
      if (newest && agrees(write, newest)) continue;
      this.#conflicts.set(write.key, newest ?? null);
      return;
    }
  }

  #write(method: string, path: string, { key }: Write, body?: unknown, version?: number) {
    const headers = new Headers({ "Idempotency-Key": key });
    if (version !== undefined) headers.set("If-Match", `"${version}"`);
    return this.call(path, { method, headers, body: JSON.stringify(body), expected: [404, 412] });
  }

  async #fetch(id: number): Promise<Task | undefined> {
    const { ok, body } = await this.call(`/api/tasks/${id}`, { expected: [404] });
    return ok ? body : undefined;
  }

  /** Returns the task as the service had it last. */
  #newest(id: number): Task | undefined {
    return this.#sent.findLast(({ task }) => task?.id === id)?.task ?? this.#tasks.get(id);
  }

  #done(write: Write, { ok, replayed, body }: Answer): void {
    // A repeated answer has the task as it was then.
    this.#sent.push({ write, task: ok && !replayed ? body : undefined });
    this.#dequeue(write);
  }

  // ---- The writes, each under a name of its own, so that two windows never overwrite one

  #edit(
    kind: Edit["kind"],
    { id, version }: Row,
    fields: Partial<Fields>,
    before: Partial<Fields>,
  ): Edit {
    return { kind, key: crypto.randomUUID(), order: this.#nextOrder(), id, fields, before, version };
  }

  #nextOrder(): number {
    return Math.max(Date.now(), ...this.#writes.map(({ order }) => order + 1));
  }

  #enqueue(write: Write): void {
    const name = this.#name(`write/${write.key}`);
    try {
      localStorage.setItem(name, JSON.stringify(write));
    } catch {
      localStorage.removeItem(this.#name("copy")); // no room: a write is worth more than the copy
      localStorage.setItem(name, JSON.stringify(write));
    }
    this.#readWrites();
    this.#changed();
    this.#wake.abort();
  }

  #dequeue(write: Write): void {
    localStorage.removeItem(this.#name(`write/${write.key}`));
    this.#writes = this.#writes.filter(({ key }) => key !== write.key);
  }

  #readWrites(): void {
    const writes = this.#stored("write/").map((name): Write => JSON.parse(localStorage[name]));
    this.#writes = writes.sort((a, b) => a.order - b.order);
    for (const name of this.#stored("made/")) {
      this.#made.set(name.slice(this.#name("made/").length), Number(localStorage[name]));
      if (writes.length === 0) localStorage.removeItem(name);
    }
    for (const key of this.#conflicts.keys()) {
      if (!writes.some((write) => write.key === key)) this.#conflicts.delete(key);
    }
  }

  #idOf({ id }: { id: Id }): Id {
    return typeof id === "string" ? (this.#made.get(id) ?? id) : id;
  }

  // ---- Storage

  #name(rest: string): string {
    return `todo/${this.userId}/${rest}`;
  }

  #stored(kind: string): string[] {
    return Object.keys(localStorage).filter((name) => name.startsWith(this.#name(kind)));
  }

  #readCopy(): void {
    const stored = localStorage.getItem(this.#name("copy"));
    if (!stored) return;
    const { cursor, tasks }: { cursor: string; tasks: Task[] } = JSON.parse(stored);
    this.#cursor = cursor;
    this.#tasks = new Map(tasks.map((task) => [task.id, task]));
  }

  #storeCopy(): void {
    const copy = { cursor: this.#cursor, tasks: [...this.#tasks.values()] };
    try {
      localStorage.setItem(this.#name("copy"), JSON.stringify(copy));
    } catch {
      localStorage.removeItem(this.#name("copy")); // too large: the next visit reads everything
    }
  }

  #onStorage({ key, newValue }: StorageEvent): void {
    const made = this.#name("made/");
    if (key?.startsWith(made) && newValue) this.#made.set(key.slice(made.length), Number(newValue));
    if (!key?.startsWith(this.#name("write/"))) return;
    this.#readWrites();
    this.#changed();
    // Another window may have sent it, so the service may be back.
    if (this.#connection === "offline") this.#wake.abort();
  }

  #onVisibility(): void {
    if (document.visibilityState === "hidden") this.deleteForGood();
  }

  // ---- The rows

  #changed(): void {
    this.#snapshot = {
      rows: this.#rows(),
      connection: this.#connection,
      reason: this.#reason,
      unsent: this.#writes.length - this.#conflicts.size,
      deleted: this.#deleted,
      problems: this.#problems,
    };
    for (const listener of this.#listeners) listener();
  }

  #row(id: Id): Row | undefined {
    return this.#snapshot.rows.find((row) => row.id === id);
  }

  /** Returns the copy with the writes on top. */
  #rows(): Row[] {
    const keys = new Map([...this.#made].map(([key, id]) => [id, key]));
    const rows = new Map<Id, Row>();
    for (const task of this.#tasks.values()) {
      // A task that was created here keeps its key, so that an edit of it can go on.
      rows.set(task.id, { ...task, key: keys.get(task.id) ?? String(task.id), unsent: false });
    }
    for (const { write } of this.#sent) this.#apply(write, rows, false);
    // While the service answers, a write is sent sooner than the user can read that it is not.
    const waits = this.#connection === "offline";
    for (const write of this.#writes) this.#apply(write, rows, waits);
    if (this.#deleted) rows.delete(this.#idOf(this.#deleted));
    return [...rows.values()];
  }

  #apply(write: Write, rows: Map<Id, Row>, unsent: boolean): void {
    const id = this.#idOf(write);
    const row = rows.get(id);
    const theirs = this.#conflicts.get(write.key);
    if (write.kind === "create") {
      const { fields, key, created_at } = write;
      if (!row) rows.set(id, { ...fields, id, key, version: 0, created_at, unsent });
    } else if (theirs !== undefined) {
      const { version } = write;
      const shown = row ?? { ...whole(write), id, key: String(id), version, created_at: "", unsent };
      const mine = { ...shown, ...write.fields };
      rows.set(id, { ...mine, conflict: { write: write.key, kind: write.kind, mine, theirs } });
    } else if (write.kind === "delete") {
      rows.delete(id);
    } else if (row) {
      rows.set(id, { ...row, ...write.fields, unsent: unsent || row.unsent });
    }
  }
}

/** Returns whether a task still has what the user saw, or has what they want already. */
function agrees({ fields, before }: Edit, task: Task): boolean {
  return FIELDS.every(
    (name) => !(name in before) || task[name] === before[name] || task[name] === fields[name],
  );
}

/** Returns the fields that a write knows of a task that nobody else knows any more. */
function whole({ before, fields }: Edit): Fields {
  const empty: Fields = {
    title: "",
    description: null,
    status: "incomplete",
    priority: null,
    due_date: null,
  };
  return { ...empty, ...before, ...fields };
}

async function untilVisible(signal: AbortSignal): Promise<void> {
  if (document.visibilityState === "visible") return;
  await event(document, "visibilitychange", signal);
}

async function pause(seconds: number, signal: AbortSignal): Promise<void> {
  await new Promise<void>((resolve) => {
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => resolve(), { once: true });
  });
}

function event(target: EventTarget, name: string, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    target.addEventListener(name, () => resolve(), { once: true, signal });
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
