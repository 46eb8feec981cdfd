// The baseline in Node: Fastify, its JWT plugin and pg, with response schemas and named prepared
// statements. ROW_SECURITY=on also sends our preamble (preamble.py) before each statement, in one
// transaction and one write, with pg's pipeline mode. VERSIONS=on also uses statements like ours,
// with versions, `completed_at` and tombstones. run.py starts it.
import Fastify from "fastify";
import jwt from "@fastify/jwt";
import pg from "pg";
import { beginOwner, plain, versioned } from "./statements.mjs";

const { BETTER_AUTH_SECRET, DATABASE_URL, PORT, POOL_SIZE, ROW_SECURITY, VERSIONS } = process.env;
pg.types.setTypeParser(pg.types.builtins.INT8, Number);
const versions = VERSIONS === "on";
const rowSecurity = versions || ROW_SECURITY === "on";
const pool = new pg.Pool({
  connectionString: DATABASE_URL,
  max: Number(POOL_SIZE),
  min: 1,
  pipeline: rowSecurity,
  statement_timeout: 5000,
  lock_timeout: 2000,
});

const app = Fastify({ logger: false });
await app.register(jwt, {
  secret: BETTER_AUTH_SECRET,
  verify: { algorithms: ["HS256"], cache: true },
});

const text = { type: ["string", "null"] };
const task = {
  type: "object",
  properties: {
    id: { type: "integer" },
    user_id: { type: "string" },
    title: { type: "string" },
    description: text,
    status: { type: "string" },
    completed: { type: "boolean" },
    priority: text,
    due_date: { type: ["string", "null"], format: "date-time" },
    created_at: { type: "string", format: "date-time" },
    updated_at: { type: "string", format: "date-time" },
    ...(versions && {
      completed_at: { type: ["string", "null"], format: "date-time" },
      version: { type: "integer" },
    }),
  },
};
const input = (required) => ({
  type: "object",
  required,
  additionalProperties: false,
  properties: {
    title: { type: "string", minLength: 1, maxLength: 255 },
    description: { type: ["string", "null"], maxLength: 5000 },
    status: { enum: ["incomplete", "complete"] },
    priority: { enum: ["low", "medium", "high", null] },
    due_date: { type: ["string", "null"], format: "date-time" },
  },
});
const params = { type: "object", properties: { id: { type: "integer", minimum: 1 } } };

const OWNER = "set_config('role', 'todo_member', true), name_owner($1)";
const before = (name, timeout, more = "") => ({
  name,
  text: `SELECT ${OWNER}, set_config('statement_timeout', '${timeout}', true),
    set_config('lock_timeout', '2000', true)${more}`,
});
const BEFORE_ONE = before("before_one", 5000);
const BEFORE_LIST = before("before_list", 30000, `, set_config('random_page_cost', '1.1', true),
  set_config('max_parallel_workers_per_gather', '0', true)`);

async function alone(...what) {
  return (await pool.query(plain(...what))).rows;
}

// Send BEGIN, the preamble, the statements and COMMIT in one write.
async function together(name, user, ...statements) {
  const client = await pool.connect();
  const { stream } = client.connection;
  try {
    stream.cork();
    const answers = Promise.all([
      client.query({ name: "begin", text: "BEGIN" }),
      client.query({ ...(name === "list" ? BEFORE_LIST : BEFORE_ONE), values: [user.sub] }),
      ...statements.map((statement) => client.query(statement)),
      client.query({ name: "commit", text: "COMMIT" }),
    ]);
    stream.uncork();
    const { rows } = (await answers).at(-2);
    client.release();
    return rows;
  } catch (error) {
    client.release(error);
    if (error.code === "TD401") error.statusCode = 401; // the token is older than the account's erasure
    throw error;
  }
}

async function withVersions(name, user, ...values) {
  const statement = versioned(name, user, ...values);
  const rows = await together(name, user, statement);
  if (rows.length || name !== "create") return rows;
  return together(name, user, beginOwner(user), statement);
}

const withRowSecurity = (name, user, ...values) =>
  together(name, user, plain(name, user, ...values));
const run = versions ? withVersions : rowSecurity ? withRowSecurity : alone;
const one = async (reply, name, user, ...values) => {
  const [row] = await run(name, user, ...values);
  if (row === undefined) return reply.code(404).send({ error: "Task not found" });
  return row;
};

app.get("/livez", async () => ({ status: "ok" }));
app.register(async (api) => {
  api.addHook("onRequest", async (request) => request.jwtVerify());
  const answer = { response: { "2xx": task } };
  api.get("/tasks", { schema: { response: { 200: { type: "array", items: task } } } }, (request) =>
    run("list", request.user));
  api.post("/tasks", { schema: { body: input(["title"]), ...answer } }, async (request, reply) => {
    const { title, description, status, priority, due_date } = request.body;
    reply.code(201);
    return one(reply, "create", request.user, title, description, status, priority, due_date);
  });
  api.get("/tasks/:id", { schema: { params, ...answer } }, (request, reply) =>
    one(reply, "get", request.user, request.params.id));
  api.put("/tasks/:id", { schema: { params, body: input([]), ...answer } }, (request, reply) => {
    const { title, description, status, priority, due_date } = request.body;
    const { user, params: { id } } = request;
    return one(reply, "update", user, id, title, description, status, priority, due_date);
  });
  api.patch("/tasks/:id/complete", { schema: { params, ...answer } }, (request, reply) =>
    one(reply, "complete", request.user, request.params.id));
  api.delete("/tasks/:id", { schema: { params } }, async (request, reply) => {
    const [row] = await run("delete", request.user, request.params.id);
    return row ? reply.code(204).send() : reply.code(404).send({ error: "Task not found" });
  });
}, { prefix: "/api" });

await app.listen({ host: "127.0.0.1", port: Number(PORT) });
