// Renames a task with each generated client: what came is sent back, with another title.
import createClient from "openapi-fetch";
import { changeTask, createTask, getTask } from "./hey-api";
import { client } from "./hey-api/client.gen";
import { changeTask as orvalChange, getTask as orvalGet } from "./orval/client";
import type { paths } from "./openapi-typescript";

const baseUrl = process.argv[2];
const headers = { Authorization: `Bearer ${process.argv[3]}` };

async function withHeyApi(): Promise<string> {
  client.setConfig({ baseUrl, headers });
  const { data: created } = await createTask({ body: { title: "new" }, throwOnError: true });
  const { data: task } = await getTask({ path: { id: created.id }, throwOnError: true });
  const body = { ...task, title: "hey-api" };
  const { data: changed } = await changeTask({ path: { id: task.id }, body, throwOnError: true });
  return changed.title;
}

async function withOpenapiFetch(id: number): Promise<string> {
  const fetching = createClient<paths>({ baseUrl, headers });
  const params = { path: { id } };
  const { data: task, error } = await fetching.GET("/api/tasks/{id}", { params });
  if (!task) throw new Error(error.detail);
  const body = { ...task, title: "openapi-fetch" };
  const { data: changed } = await fetching.PUT("/api/tasks/{id}", { params, body });
  return changed?.title ?? "not changed";
}

async function withOrval(id: number): Promise<string> {
  const relative = globalThis.fetch;
  globalThis.fetch = (path, options) => relative(`${baseUrl}${path}`, options);
  const answer = await orvalGet(id, { headers });
  if (answer.status === 304) throw new Error("not modified");
  if (answer.status !== 200) throw new Error(answer.data.detail);
  const body = { ...answer.data, title: "orval" };
  const changed = await orvalChange(id, body, { headers });
  return changed.status === 200 ? changed.data.title : changed.data.detail;
}

async function main(): Promise<void> {
  console.log(await withHeyApi());
  const { data: tasks } = await createClient<paths>({ baseUrl, headers }).GET("/api/tasks");
  const id = tasks?.[0]?.id ?? 0;
  console.log(await withOpenapiFetch(id));
  console.log(await withOrval(id));
}

main().catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
