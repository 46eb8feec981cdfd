// The baseline in Node: Fastify, its JWT plugin and pg, with response schemas and named prepared
// statements. GUARANTEE=on gives it what ours has: a transaction, the role and the user for row
// security, for a write the look whether the account was erased, all sent at once in pg's pipeline
// mode. Run by run.py.
import Fastify from "fastify";
import jwt from "@fastify/jwt";
import pg from "pg";

const { BETTER_AUTH_SECRET, DATABASE_URL, PORT, POOL_SIZE, GUARANTEE } = process.env;
pg.types.setTypeParser(pg.types.builtins.INT8, Number);
const guarantee = GUARANTEE === "on";
const pool = new pg.Pool({
  connectionString: DATABASE_URL,
  max: Number(POOL_SIZE),
  min: 1,
  pipeline: guarantee,
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

const COLUMNS =
  "id, user_id, title, description, status, status = 'complete' AS completed, priority, due_date, created_at, updated_at";
const NEXT = "greatest(clock_timestamp(), updated_at + interval '1 microsecond')";
const SQL = {
  list: `SELECT ${COLUMNS} FROM tasks WHERE user_id = $1 ORDER BY created_at DESC, id DESC`,
  get: `SELECT ${COLUMNS} FROM tasks WHERE user_id = $1 AND id = $2`,
  create: `WITH owner AS (INSERT INTO users (id) VALUES ($1) ON CONFLICT DO NOTHING)
    INSERT INTO tasks (user_id, title, description, status, priority, due_date)
    VALUES ($1, $2, $3, coalesce($4, 'incomplete'), $5, $6) RETURNING ${COLUMNS}`,
  update: `UPDATE tasks SET title = coalesce($3, title), description = coalesce($4, description),
    status = coalesce($5, status), priority = coalesce($6, priority),
    due_date = coalesce($7, due_date), updated_at = ${NEXT}
    WHERE user_id = $1 AND id = $2 RETURNING ${COLUMNS}`,
  complete: `UPDATE tasks SET status = CASE status WHEN 'complete' THEN 'incomplete' ELSE 'complete' END,
    updated_at = ${NEXT} WHERE user_id = $1 AND id = $2 RETURNING ${COLUMNS}`,
  delete: "DELETE FROM tasks WHERE user_id = $1 AND id = $2 RETURNING id",
};

const OWNER = "set_config('role', 'todo_member', true), set_config('app.user_id', $1, true)";
const reader = (user) => ({ name: "reader", text: `SELECT ${OWNER}`, values: [user.sub] });
const writer = (user) => ({
  name: "writer",
  text: `SELECT ${OWNER}, begin_write($1, $2, false)`,
  values: [user.sub, user.iat],
});

async function plain(name, user, ...values) {
  return (await pool.query({ name, text: SQL[name], values: [user.sub, ...values] })).rows;
}

async function guaranteed(name, user, ...values) {
  const client = await pool.connect();
  const { stream } = client.connection;
  try {
    stream.cork(); // one write instead of four
    const answers = Promise.all([
      client.query({ name: "begin", text: "BEGIN" }),
      client.query(name === "list" || name === "get" ? reader(user) : writer(user)),
      client.query({ name, text: SQL[name], values: [user.sub, ...values] }),
      client.query({ name: "commit", text: "COMMIT" }),
    ]);
    stream.uncork();
    const [, , { rows }] = await answers;
    client.release();
    return rows;
  } catch (error) {
    client.release(error);
    throw error;
  }
}

const run = guarantee ? guaranteed : plain;
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
