// Prints as JSON what the generated zod schemas accept, and what zod accepts with the document's own
// schema. The generated ones use a zod that counts UTF-16 units. The newest counts code points.
import { readFileSync } from "node:fs";
import type { z } from "zod";
import { z as newest } from "zod-newest";
import { zNewTask, zTask, zTaskChange } from "./hey-api/zod.gen";
import * as orval from "./orval/zod";

const { schemas } = JSON.parse(readFileSync("openapi.json", "utf8")).components;
const change = newest.fromJSONSchema(schemas.TaskChange);
const emoji = { title: "😀".repeat(200), description: "😀".repeat(4000) };
const task = schemas.Task.examples[0];
const accepts = (schema: z.ZodType | newest.ZodType, value: unknown) =>
  schema.safeParse(value).success;

console.log(
  JSON.stringify({
    "hey-api: emoji": accepts(zNewTask, emoji) && accepts(zTaskChange, emoji),
    "hey-api: a task": accepts(zTask, task),
    "hey-api: a task sent back": accepts(zTaskChange, task),
    "hey-api: a task without a title": accepts(zNewTask, {}),
    "orval: emoji": accepts(orval.createTaskBody, emoji) && accepts(orval.changeTaskBody, emoji),
    "orval: a task": accepts(orval.getTaskResponse, task),
    "orval: a task sent back": accepts(orval.changeTaskBody, task),
    "orval: a task without a title": accepts(orval.createTaskBody, {}),
    "zod: emoji": accepts(change, emoji),
    "zod: a task sent back": accepts(change, task),
    "zod: an empty change": accepts(change, {}),
  }),
);
