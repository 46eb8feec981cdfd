// Plays one scene with the TypeScript of docs/api.md, and prints what it saw as JSON.
import {
  api, call, follow, pages, Refused, refreshing, save, searching, send, write,
  type Batch, type Operation, type Task,
} from "./documentation.js";

const create = (task: { title: string }): Promise<Task> => write("POST", "/api/tasks", task);

const scenes: Record<string, () => Promise<unknown>> = {
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
    const network = globalThis.fetch;
    const sent = new Promise<void>((resolve) => {
      globalThis.fetch = (...request) => {
        resolve();
        return network(...request);
      };
    });
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
};

async function main([url, token, scene]: string[]): Promise<void> {
  api.url = url ?? "";
  api.token = async () => token ?? "";
  console.log(JSON.stringify(await scenes[scene ?? ""]?.()));
}

void main(process.argv.slice(2));
