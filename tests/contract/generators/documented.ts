// Plays one scene with the TypeScript of docs/api.md, and prints what it saw as JSON.
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import {
  api, call, follow, follower, pages, Refused, refreshing, save, searching, send, write,
  type Batch, type Changes, type Edit, type Operation, type Task,
} from "./documentation.js";

const create = (task: { title: string }): Promise<Task> => write("POST", "/api/tasks", task);

/** What the user of a follower does with the task or the conflict of a title. */
type Step = [action: string, title: string, changes?: Changes];

/** A file in place of `localStorage`. */
const fileStorage = {
  getItem: (name: string) => (existsSync(name) ? readFileSync(name, "utf-8") : null),
  setItem: writeFileSync,
};

const scenes: Record<string, (...words: string[]) => Promise<unknown>> = {
  async retry() {
    return [await create({ title: "once" })];
  },

  async key() {
    const again = () => write("POST", "/api/tasks", { title: "once" }, "one-intended-write");
    return [await again(), await again()];
  },

  async deletion() {
    const task = await create({ title: "gone" });
    return [await write("DELETE", `/api/tasks/${task.id}`) ?? null];
  },

  async editors() {
    const read = await create({ title: "shared" });
    const words = Array.from("abcdefgh");
    await Promise.all(words.map((word) => save(read, { description: word }, async (newest) => ({
      description: `${newest.description ?? ""}${word}`,
    }))));
    const kept = await save(read, { title: "stale" }, () => null);
    const mine = await save(kept, { priority: "high" }, () => null);
    return [kept.title, mine.priority, mine.description];
  },

  async more() {
    for (const title of "abcde") await create({ title });
    const read = [];
    for await (const page of pages("/api/tasks?limit=2&order=asc")) {
      read.push(...page.map((task) => task.title));
    }
    return read;
  },

  async typing() {
    for (const title of ["old milk", "new milk"]) await create({ title });
    const shown: string[] = [];
    const search = searching((tasks) => shown.push(tasks.map((task) => task.title).join()), 5);
    const sent = nextRequest();
    const older = search("old");
    await sent;
    await Promise.all([older, ...["n", "ne", "new"].map(search)]);
    return shown;
  },

  async refresh() {
    await create({ title: "first" });
    const refresh = refreshing<Task[]>("/api/tasks");
    const first = await refresh();
    const same = await refresh();
    await create({ title: "second" });
    const newer = await refresh();
    return [first === same, newer.map((task) => task.title)];
  },

  async offline() {
    const task = await create({ title: "old" });
    const gone = await create({ title: "gone" });
    const stored: Batch[] = [
      {
        key: crypto.randomUUID(),
        operations: [
          { op: "create", task: { title: "written offline", priority: "low" } },
          { op: "update", id: task.id, task: { title: "new" }, if_match: task.version },
        ],
      },
      {
        key: crypto.randomUUID(),
        operations: [{ op: "complete", id: task.id }, { op: "delete", id: gone.id }],
      },
    ];
    const beforeReload = structuredClone(stored);
    const answers: unknown[] = [];
    const sent = (batch: Batch, results: unknown) => {
      stored.splice(stored.indexOf(batch), 1);
      answers.push(results);
    };
    await send(stored, sent);
    await send(beforeReload, sent);
    return [stored.length, JSON.stringify(answers[0]) === JSON.stringify(answers[2])];
  },

  async stale() {
    const task = await create({ title: "theirs" });
    const operations: Operation[] = [
      { op: "create", task: { title: "undone" } },
      { op: "update", id: task.id, task: { title: "mine" }, if_match: task.version - 1 },
    ];
    const queue = [{ key: crypto.randomUUID(), operations }];
    const refused: unknown = await send(queue, () => void queue.pop()).catch((error) => error);
    if (!(refused instanceof Refused)) throw refused;
    return [refused.status, refused.code, refused.operation, queue.length];
  },

  async copying() {
    for (const title of "abc") await create({ title });
    const copy = new Map<number, Task>();
    const cursor = await follow(copy);
    const [first] = copy.values();
    const following = follow(copy, cursor, 10);
    await call(`/api/tasks/${first?.id}`, { method: "DELETE" });
    await following;
    const listed: Task[] = await (await call("/api/tasks")).json();
    return [copy.size, listed.every((task) => copy.get(task.id)?.version === task.version)];
  },

  /** A page that opens on what an earlier one has stored, and closes after the steps. */
  async page(name = "", steps = "[]") {
    let shown: [tasks: Task[], refused: Edit[]] = [[], []];
    const { edit, drop, sync } = follower(name, fileStorage, (...news) => (shown = news));
    let failure: string | null = null;
    const read = new Map(shown[0].map((task) => [task.title, task]));
    const actions: Record<string, (...step: Step) => unknown> = {
      create: (_, title, changes) => edit({ title, ...changes }),
      change: (_, title, changes) => edit(changes ?? {}, task(title)),
      append: (_, title, changes) => edit({
        description: `${task(title).description ?? ""}${changes?.description}`,
      }, task(title)),
      /** As a form does that was opened with the page. */
      "change as read": (_, title, changes) => edit(changes ?? {}, read.get(title)),
      delete: (_, title) => edit(null, task(title)),
      "keep mine": (_, title) => {
        const { edit: refused, mine, theirs } = conflict(title);
        drop(refused);
        edit(theirs ? refused.changes : mine ?? null, theirs);
      },
      "keep theirs": (_, title) => drop(conflict(title).edit),
      sync: () => sync().catch((error) => (failure = error.message)),
    };
    const task = (title: string): Task => found(shown[0].find((each) => each.title === title));
    const conflicts = () => shown[1].map((refused) => ({
      edit: refused,
      mine: refused.changes ? { ...refused.task, ...refused.changes } : undefined,
      theirs: shown[0].find(({ id }) => id === refused.task.id),
    }));
    const conflict = (title: string) => found(
      conflicts().find(({ mine, theirs }) => [mine?.title, theirs?.title].includes(title)),
    );
    for (const step of JSON.parse(steps) as Step[]) await found(actions[step[0]])(...step);
    return { tasks: shown[0], conflicts: conflicts(), failure };
  },

  /** Two windows: one waits for news, and its user edits meanwhile. */
  async live() {
    const titles: string[][] = [[], []];
    const memory = { getItem: () => null, setItem() {} };
    const [first, second] = titles.map((_, window) => follower("", memory, (tasks) => {
      titles[window] = tasks.map(({ title }) => title);
    }));
    if (!first || !second) throw new Error("there are two windows");
    await first.sync();
    const asked = nextRequest();
    const edited = new AbortController();
    const waiting = first.sync(60, edited.signal);
    await asked;
    first.edit({ title: "mine" });
    edited.abort();
    await waiting.catch(() => first.sync());
    await second.sync();
    const before = titles[1];
    const news = first.sync(60);
    second.edit({ title: "theirs" });
    await second.sync();
    await news;
    return [before, titles[0]];
  },
};

/** Resolves when the next request is sent. */
function nextRequest(): Promise<void> {
  const network = globalThis.fetch;
  return new Promise((resolve) => {
    globalThis.fetch = (...request) => {
      globalThis.fetch = network;
      resolve();
      return network(...request);
    };
  });
}

function found<T>(value: T | undefined): T {
  if (value === undefined) throw new Error("there is no such thing");
  return value;
}

async function main([url, token, scene, ...words]: string[]): Promise<void> {
  api.url = url ?? "";
  api.token = async () => token ?? "";
  console.log(JSON.stringify(await scenes[scene ?? ""]?.(...words)));
}

void main(process.argv.slice(2));
