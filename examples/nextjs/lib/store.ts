// One user's tasks in one window: a copy of the service's, and the writes it does not have yet.
//
// A loop sends the writes, then asks the service for changes and waits for them. What the user sees
// is the copy with the writes on top. Both are in `localStorage`, so they survive a reload, and all
// windows of the user share the writes.
import { type Answer, type Call, Refused, SignedOut, Unreachable } from "./api";
import { type Conflict, type Row, Rows } from "./rows";
import { differences, type Fields, FIELDS, namesOf, pick, type Task } from "./tasks";
import { agrees, type Creation, type Edit, type Write, Writes } from "./writes";

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
  readonly #prefix: string;
  readonly #writes: Writes;
  /** Writes that the service has, and the copy not yet. */
  #sent: { write: Write; task?: Task }[] = [];
  /** What the service has in place of what an edit expects, by the key of the edit. */
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
    userId: string,
    private readonly onSignedOut: () => void,
  ) {
    this.#prefix = `todo/${userId}/`;
    this.#writes = new Writes(this.#prefix);
  }

  /** Begins to follow the service. Returns a function that ends it. */
  start(): () => void {
    this.#stopped = new AbortController();
    const { signal } = this.#stopped;
    this.#readCopy();
    this.#writes.read();
    addEventListener("storage", (event) => this.#onStorage(event), { signal });
    for (const name of ["online", "offline"]) {
      addEventListener(name, () => this.#wake.abort(), { signal });
    }
    document.addEventListener("visibilitychange", () => this.#onVisibility(), { signal });
    this.#channel = new BroadcastChannel(this.#prefix);
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
    const next = this.#writes.next();
    const created_at = new Date().toISOString();
    this.#enqueue({ kind: "create", ...next, id: next.key, fields, created_at });
  }

  /** Changes a task from what the user saw, which may be older than what the copy has now. */
  change(row: Row, fields: Partial<Fields>): void {
    const changes = differences(fields, row);
    if (namesOf(changes).length === 0) return;
    const { id, version } = row;
    const before = pick(row, namesOf(changes));
    const next = this.#writes.next();
    this.#enqueue({ kind: "change", ...next, id, version, before, fields: changes });
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
    const { id, version } = this.#deleted;
    const before = pick(this.#deleted, FIELDS);
    this.#deleted = null;
    this.#enqueue({ kind: "delete", ...this.#writes.next(), id, version, before, fields: {} });
  };

  /** Ends a conflict: with the user's version, or with that of the service. */
  resolve(row: Row, { write: key, theirs }: Conflict, choice: "mine" | "theirs"): void {
    const writes = this.#writes.list.filter((each) => this.#writes.idOf(each) === row.id);
    const write = writes.find((each) => each.key === key);
    this.#conflicts.delete(key);
    if (!write || write.kind === "create") return this.#changed();
    if (choice === "mine" && theirs) {
      const before = pick(theirs, namesOf(write.before));
      return this.#enqueue({ ...write, before, version: theirs.version });
    }
    // Later edits of the task belong to the user's version, too.
    for (const each of writes) this.#writes.remove(each);
    if (choice === "mine") this.add(pick(row, FIELDS));
    else this.#changed();
  }

  dismiss(problem: Problem): void {
    this.#problems = this.#problems.filter((each) => each !== problem);
    this.#changed();
  }

  /** Removes everything of the user from this device. Their other windows notice. */
  forget(): void {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(this.#prefix));
    for (const name of names) localStorage.removeItem(name);
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
    if (this.#writes.list.length === 0) return;
    await navigator.locks.request(this.#prefix, async () => {
      this.#readWrites();
      for (let write = this.#next(); write; write = this.#next()) await this.#send(write);
    });
  }

  /** Returns the first write that does not wait for the user to end a conflict. */
  #next(): Write | undefined {
    const blocked = new Set<number | string>();
    return this.#writes.list.find((write) => {
      const id = this.#writes.idOf(write);
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
      const title = write.fields.title ?? this.#tasks.get(Number(write.id))?.title ?? "";
      this.#problems = [...this.#problems, { key: write.key, title, message: error.message }];
      this.#writes.remove(write);
    }
    this.#changed();
  }

  async #sendCreation(write: Creation): Promise<void> {
    const answer = await this.#write("POST", "/api/tasks", write, write.fields);
    this.#writes.made(write, answer.body.id);
    this.#done(write, answer);
  }

  /** Sends an edit. If the task has changed, sends it again, unless that would overwrite an edit. */
  async #sendEdit(write: Edit): Promise<void> {
    const id = this.#writes.idOf(write);
    if (typeof id === "string") return this.#writes.remove(write); // its creation was refused
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
    const expected = version === undefined ? [] : [404, 412]; // a creation finds no other version
    return this.call(path, { method, headers, body: JSON.stringify(body), expected });
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
    this.#writes.remove(write);
  }

  // ---- Storage

  #enqueue(write: Write): void {
    try {
      this.#writes.add(write);
    } catch {
      localStorage.removeItem(`${this.#prefix}copy`); // no room: a write is worth more
      this.#writes.add(write);
    }
    this.#changed();
    this.#wake.abort();
  }

  /** Reads what the windows have stored. What another window has removed is no conflict here. */
  #readWrites(): void {
    this.#writes.read();
    const keys = new Set(this.#writes.list.map(({ key }) => key));
    this.#conflicts = new Map([...this.#conflicts].filter(([key]) => keys.has(key)));
  }

  #readCopy(): void {
    const stored = localStorage.getItem(`${this.#prefix}copy`);
    if (!stored) return;
    const { cursor, tasks }: { cursor: string; tasks: Task[] } = JSON.parse(stored);
    this.#cursor = cursor;
    this.#tasks = new Map(tasks.map((task) => [task.id, task]));
  }

  #storeCopy(): void {
    const copy = { cursor: this.#cursor, tasks: [...this.#tasks.values()] };
    try {
      localStorage.setItem(`${this.#prefix}copy`, JSON.stringify(copy));
    } catch {
      localStorage.removeItem(`${this.#prefix}copy`); // too large: the next visit reads everything
    }
  }

  #onStorage({ key, newValue }: StorageEvent): void {
    if (!this.#writes.learn(key, newValue)) return;
    this.#readWrites();
    this.#changed();
    // Another window may have sent something, so the service may be back.
    if (this.#connection === "offline") this.#wake.abort();
  }

  #onVisibility(): void {
    if (document.visibilityState === "hidden") this.deleteForGood();
  }

  // ---- What the page sees

  #changed(): void {
    this.#snapshot = {
      rows: this.#rows(),
      connection: this.#connection,
      reason: this.#reason,
      unsent: this.#writes.list.length - this.#conflicts.size,
      deleted: this.#deleted,
      problems: this.#problems,
    };
    for (const listener of this.#listeners) listener();
  }

  #rows(): Row[] {
    const rows = new Rows(this.#tasks.values(), this.#writes.keys());
    for (const { write } of this.#sent) rows.apply(write, this.#writes.idOf(write), false);
    // While the service answers, a write is sent sooner than the user can read that it is not.
    const waits = this.#connection === "offline";
    for (const write of this.#writes.list) {
      const id = this.#writes.idOf(write);
      const theirs = this.#conflicts.get(write.key);
      if (theirs === undefined || write.kind === "create") rows.apply(write, id, waits);
      else rows.showConflict(write, id, theirs);
    }
    if (this.#deleted) rows.remove(this.#writes.idOf(this.#deleted));
    return rows.list();
  }
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
