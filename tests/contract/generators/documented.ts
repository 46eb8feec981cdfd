// Uses the TypeScript of docs/api.md on a running service, and prints what happened as JSON.
import { api, call, follow, pages, save, searching, write, type Task } from "./documentation.js";

api.url = process.argv[2] ?? "";
api.token = async () => process.argv[3] ?? "";

const network = globalThis.fetch;

// Lets the request through, and then breaks the connection before its answer.
function cutNextAnswer(): void {
  globalThis.fetch = async (...request) => {
    await network(...request);
    globalThis.fetch = network;
    throw new TypeError("fetch failed");
  };
}

async function retry(): Promise<unknown> {
  cutNextAnswer();
  const response = await write("POST", "/api/tasks", { title: "once" });
  return [response.status, response.headers.get("Idempotency-Replayed")];
}

async function conflict(): Promise<unknown> {
  const mine: Task = await (await write("POST", "/api/tasks", { title: "draft" })).json();
  await save(mine, { priority: "high" }, () => null);
  const merged = await save(mine, { title: "final" }, () => ({ title: "final" }));
  const kept = await save(mine, { title: "stale" }, () => null);
  return [merged.title, merged.priority, kept.title];
}

async function more(): Promise<unknown> {
  const operations = ["a", "b", "c"].map((title) => ({ op: "create", task: { title } }));
  await write("POST", "/api/tasks/batch", { operations });
  const sizes = [];
  for await (const page of pages("/api/tasks?limit=2")) sizes.push(page.length);
  return sizes;
}

async function typing(): Promise<unknown> {
  const shown: string[][] = [];
  const search = searching((tasks) => shown.push(tasks.map((task) => task.title)), 5);
  await Promise.all(["o", "on", "ONC"].map(search));
  return shown;
}

async function copying(): Promise<unknown> {
  const copy = new Map<number, Task>();
  const cursor = await follow(copy);
  const [first] = copy.values();
  const following = follow(copy, cursor, 10);
  await call(`/api/tasks/${first?.id}`, { method: "DELETE" });
  await following;
  const listed: Task[] = await (await call("/api/tasks")).json();
  return [copy.size, listed.every((task) => copy.get(task.id)?.version === task.version)];
}

async function main(): Promise<void> {
  const results = [];
  for (const scene of [retry, conflict, more, typing, copying]) results.push(await scene());
  console.log(JSON.stringify(results));
}

void main();
