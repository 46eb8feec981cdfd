// What a task is here, and how a list of them is searched, filtered and sorted.

export type Fields = {
  title: string;
  description: string | null;
  status: "incomplete" | "complete";
  priority: "low" | "medium" | "high" | null;
  due_date: string | null;
};

export type Task = Fields & { id: number; version: number; created_at: string };

/** What a new task is, if the user says nothing about it. */
export const NEW: Fields = {
  title: "",
  description: null,
  status: "incomplete",
  priority: null,
  due_date: null,
};

export const FIELDS = ["title", "description", "status", "priority", "due_date"] as const;
export const STATUSES = { all: "All", incomplete: "To do", complete: "Done" };
export const ORDERS = { created: "Newest", due: "Due date", priority: "Priority", title: "Title" };

export type View = { words: string; status: keyof typeof STATUSES; order: keyof typeof ORDERS };

/** Returns those of the fields that are not the same in both. */
export function differences(fields: Partial<Fields>, other: Fields): Partial<Fields> {
  return pick(fields, FIELDS.filter((name) => name in fields && fields[name] !== other[name]));
}

/** Returns the named fields of a task, and nothing else that it has. */
export function pick<T extends Partial<Fields>, Name extends keyof T>(task: T, names: readonly Name[]) {
  return Object.fromEntries(names.map((name) => [name, task[name]])) as Pick<T, Name>;
}

/** Returns the names of the fields that there are. */
export function namesOf(fields: Partial<Fields>): (keyof Fields)[] {
  return FIELDS.filter((name) => name in fields);
}

type Listed = Fields & { created_at: string };

/** Returns the tasks that have every word and the status, in order. */
export function arrange<T extends Listed>(tasks: readonly T[], { words, status, order }: View): T[] {
  const wanted = plain(words).split(/\s+/);
  return tasks
    .filter((task) => status === "all" || task.status === status)
    .filter((task) => {
      const text = plain(`${task.title} ${task.description ?? ""}`);
      return wanted.every((word) => text.includes(word));
    })
    .sort(COMPARE[order]);
}

/** Letters that do not decompose into a simpler one and its accent. */
const OTHER_LETTERS: Record<string, string> = {
  ł: "l", ø: "o", đ: "d", ħ: "h", ŧ: "t", ð: "d", æ: "ae", œ: "oe", þ: "th", ß: "ss", ı: "i",
};

/** Returns a text without case and accents, as the service's own search sees it. */
function plain(text: string): string {
  const base = text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().trim();
  return base.replace(/[łøđħŧðæœþßı]/g, (letter) => OTHER_LETTERS[letter] ?? letter);
}

const RANK = { high: 0, medium: 1, low: 2 };
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
const newest = (a: Listed, b: Listed) => compare(b.created_at, a.created_at);

const COMPARE: Record<View["order"], (a: Listed, b: Listed) => number> = {
  created: newest,
  due: (a, b) => compare(a.due_date ?? "~", b.due_date ?? "~") || newest(a, b),
  priority: (a, b) => rank(a) - rank(b) || newest(a, b),
  title: (a, b) => collator.compare(a.title, b.title) || newest(a, b),
};

function rank({ priority }: Listed): number {
  return priority ? RANK[priority] : 3;
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
