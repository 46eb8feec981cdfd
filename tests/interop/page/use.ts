// Plays scenes with the files of docs/typescript.md, and prints what each has seen as JSON.
import { GET } from "./app/api/auth/[...all]/route";
import { openTasks } from "./app/open-tasks";
import { auth, database } from "./lib/auth";
import { advice } from "./lib/errors";
import { rename } from "./lib/rename";
import { tasksOf } from "./lib/server";
import { tasksClient } from "./lib/tasks";

const headers = new Headers({ cookie: process.argv[2] ?? "" });
const clock = Date.now;
const network = globalThis.fetch;

/** Count what is sent to the service. */
function counting(): { requests: number } {
  const counted = { requests: 0 };
  globalThis.fetch = (...request) => {
    counted.requests += 1;
    return network(...request);
  };
  return counted;
}

/** The signed-in user's client, and how many tokens it has fetched. */
async function signing(...lifetimes: [issued: number, expires: number][]) {
  const session = await auth.api.getSession({ headers });
  if (!session) throw new Error("nobody is signed in");
  const fetched = { tokens: 0 };
  const client = tasksClient(async () => {
    const [issued, expires] = lifetimes[Math.min(fetched.tokens, lifetimes.length - 1)] ?? [0, 0];
    fetched.tokens += 1;
    const now = Math.floor(clock() / 1000);
    const payload = { sub: session.user.id, iat: now + issued, exp: now + expires };
    return (await auth.api.signJWT({ body: { payload } })).token;
  });
  return { client, fetched, counted: counting() };
}

const scenes: Record<string, () => Promise<unknown>> = {
  async "at the same time"() {
    const { client, fetched, counted } = await signing([0, 900]);
    await Promise.all(Array.from("abcde", () => client.GET("/api/tasks")));
    await client.GET("/api/tasks");
    return { ...fetched, ...counted };
  },

  async "about to expire"() {
    const { client, fetched, counted } = await signing([0, 75]);
    for (const seconds of [0, 5, 20, 25]) {
      Date.now = () => clock() + seconds * 1000;
      await client.GET("/api/tasks");
    }
    return { ...fetched, ...counted };
  },

  async expired() {
    const { client, fetched, counted } = await signing([-960, -60], [0, 900]);
    const { data } = await client.POST("/api/tasks", { body: { title: "once" } });
    return { ...fetched, ...counted, title: data?.title };
  },

  async "always expired"() {
    const { client, fetched, counted } = await signing([-960, -60]);
    const { error } = await client.GET("/api/tasks");
    return { ...fetched, ...counted, todo: advice(error ?? {}).todo };
  },

  /** From the future, which is another reason than its age. */
  async refused() {
    const { client, fetched, counted } = await signing([600, 1500]);
    const { error } = await client.GET("/api/tasks");
    return { ...fetched, ...counted, todo: advice(error ?? {}).todo };
  },

  async server() {
    const client = tasksOf(headers);
    await client.POST("/api/tasks", { body: { title: "open" } });
    await client.POST("/api/tasks", { body: { title: "done", status: "complete" } });
    const read = await openTasks(headers);
    const stranger = await openTasks(new Headers()).catch((error) => error.status);
    return [read.map(({ title }) => title), stranger];
  },

  async rename() {
    const client = tasksOf(headers);
    const { data: task } = await client.POST("/api/tasks", { body: { title: "first" } });
    if (!task) throw new Error("no task");
    const renamed = await rename(client, task, "second");
    const stale = await rename(client, task, "third");
    const blank = await rename(client, task, "");
    return [renamed, stale, blank, advice({})];
  },

  async route() {
    const answer = await GET(new Request(`${auth.options.baseURL}/api/auth/jwks`));
    return (await answer.json()).keys.length;
  },
};

const seen: Record<string, unknown> = {};
for (const [name, scene] of Object.entries(scenes)) {
  seen[name] = await scene();
  globalThis.fetch = network;
  Date.now = clock;
}
console.log(JSON.stringify(seen));
await database.end();
