// What the user has done and the service does not have yet. It is in `localStorage`, so it survives
// a reload, and all windows of the user share it. Each write has a name of its own there, so two
// windows never overwrite one.
import { type Fields, FIELDS, type Task } from "./tasks";

/** The id of a task, or the key of the write that creates it. */
export type Id = number | string;

/** What to do, what the user saw before, and a key by which the service does it once. */
export type Write = Creation | Edit;

export type Creation = Common & { kind: "create"; fields: Fields; created_at: string };

export type Edit = Common & {
  kind: "change" | "delete";
  fields: Partial<Fields>;
  before: Partial<Fields>;
  version: number;
};

type Common = { key: string; order: number; id: Id };

export class Writes {
  /** In the order in which the user made them. */
  list: readonly Write[] = [];
  /** The ids of created tasks by the keys of their writes. */
  #made = new Map<string, number>();

  /** @param prefix of the names in `localStorage` that belong to the user */
  constructor(private readonly prefix: string) {}

  /** Reads what all windows have stored. */
  read(): void {
    const writes = this.#names("write/").map((name): Write => JSON.parse(localStorage[name]));
    this.list = writes.sort((a, b) => a.order - b.order);
    for (const name of this.#names("made/")) {
      this.learn(name, localStorage[name]);
      if (writes.length === 0) localStorage.removeItem(name);
    }
  }

  /** Learns of what another window has stored under a name; returns whether it is ours. */
  learn(name: string | null, value: string | null): boolean {
    const made = `${this.prefix}made/`;
    if (name?.startsWith(made) && value) this.#made.set(name.slice(made.length), Number(value));
    return name?.startsWith(this.prefix) ?? false;
  }

  /** Stores a write. May throw, if there is no room. */
  add(write: Write): void {
    localStorage.setItem(this.#name(write), JSON.stringify(write));
    this.read();
  }

  remove(write: Write): void {
    localStorage.removeItem(this.#name(write));
    this.list = this.list.filter(({ key }) => key !== write.key);
  }

  /** Notes which task the service has made of a creation. */
  made({ key }: Creation, id: number): void {
    this.#made.set(key, id);
    localStorage.setItem(`${this.prefix}made/${key}`, String(id));
  }

  /** Returns the id of a task, or still the key of its creation. */
  idOf({ id }: { id: Id }): Id {
    return typeof id === "string" ? (this.#made.get(id) ?? id) : id;
  }

  /** Returns the keys of the creations by the ids of their tasks. */
  keys(): Map<number, string> {
    return new Map([...this.#made].map(([key, id]) => [id, key]));
  }

  /** Returns what each new write has. */
  next(): { key: string; order: number } {
    const order = Math.max(Date.now(), ...this.list.map((write) => write.order + 1));
    return { key: crypto.randomUUID(), order };
  }

  #name({ key }: Write): string {
    return `${this.prefix}write/${key}`;
  }

  #names(kind: string): string[] {
    return Object.keys(localStorage).filter((name) => name.startsWith(this.prefix + kind));
  }
}

/** Returns whether a task still has what the user saw, or has what they want already. */
export function agrees({ fields, before }: Edit, task: Task): boolean {
  return FIELDS.every(
    (name) => !(name in before) || task[name] === before[name] || task[name] === fields[name],
  );
}
