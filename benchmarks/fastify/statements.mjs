// The query of each operation for pg: `plain`, or `versioned` like ours.

const SHOWN = `tasks.id, tasks.user_id, tasks.title, tasks.description, tasks.status,
  tasks.status = 'complete' AS completed, tasks.priority, tasks.due_date,
  tasks.created_at, tasks.updated_at`;
const FIELDS = ["title", "description", "status", "priority", "due_date"];

const read = (shown) => ({
  list: `SELECT ${shown} FROM tasks WHERE user_id = $1 ORDER BY created_at DESC, id DESC`,
  get: `SELECT ${shown} FROM tasks WHERE user_id = $1 AND id = $2`,
});

// Plain queries have no versions. They insert the constant 1, because the columns need a value.
const CLOCK = "greatest(clock_timestamp(), updated_at + interval '1 microsecond')";
const PLAIN = {
  ...read(SHOWN),
  create: `WITH owner AS (INSERT INTO users (id, version) VALUES ($1, 1) ON CONFLICT DO NOTHING)
    INSERT INTO tasks (user_id, title, description, status, priority, due_date, version)
    VALUES ($1, $2, $3, coalesce($4, 'incomplete'), $5, $6, 1) RETURNING ${SHOWN}`,
  update: `UPDATE tasks SET title = coalesce($3, title), description = coalesce($4, description),
    status = coalesce($5, status), priority = coalesce($6, priority),
    due_date = coalesce($7, due_date), updated_at = ${CLOCK}
    WHERE user_id = $1 AND id = $2 RETURNING ${SHOWN}`,
  complete: `UPDATE tasks SET status = CASE status WHEN 'complete' THEN 'incomplete' ELSE 'complete' END,
    updated_at = ${CLOCK} WHERE user_id = $1 AND id = $2 RETURNING ${SHOWN}`,
  delete: "DELETE FROM tasks WHERE user_id = $1 AND id = $2 RETURNING id",
};

export function plain(name, user, ...values) {
  return { name, text: PLAIN[name], values: [user.sub, ...values] };
}

const WITH_VERSION = `${SHOWN}, tasks.completed_at, tasks.version`;
const NEXT = "greatest(now(), tasks.updated_at + interval '1 microsecond')";
const WRITER = `WITH writer AS (
    UPDATE users SET version = greatest(version + 1, $2::bigint)
    WHERE id = $1 AND (tokens_from IS NULL OR tokens_from <= to_timestamp($3))
    RETURNING version)`;
const ITS_OWN = "tasks.user_id = $1 AND tasks.id = $4";
const READ = read(WITH_VERSION);
const WRITE = {
  create: `${WRITER}
    INSERT INTO tasks
      (user_id, title, description, status, priority, due_date, completed_at, version)
    SELECT $1, $4, $5, coalesce($6, 'incomplete'), $7, $8::timestamptz,
      CASE WHEN $6 = 'complete' THEN now() END, writer.version
    FROM writer RETURNING ${WITH_VERSION}`,
  complete: `${WRITER}
    UPDATE tasks SET
      status = CASE tasks.status WHEN 'complete' THEN 'incomplete' ELSE 'complete' END,
      completed_at = CASE tasks.status WHEN 'complete' THEN NULL ELSE ${NEXT} END,
      updated_at = ${NEXT}, version = writer.version
    FROM writer WHERE ${ITS_OWN} RETURNING ${WITH_VERSION}`,
  delete: `${WRITER}, removed AS (
      DELETE FROM tasks USING writer WHERE ${ITS_OWN} RETURNING tasks.id, writer.version),
    tombstone AS (
      INSERT INTO tombstones (user_id, version, task_id) SELECT $1, version, id FROM removed)
    SELECT id FROM removed`,
};

// Ours does two more things. One write in sixteen removes expired tombstones. After a write that
// found no task, ours asks why (401 for a void token). Here a void token gets 404.
export function versioned(name, user, ...values) {
  if (name in READ) return { name, text: READ[name], values: [user.sub, ...values] };
  const writer = [user.sub, Date.now(), user.iat];
  if (name !== "update") return { name, text: WRITE[name], values: [...writer, ...values] };
  const [id, ...fields] = values;
  const given = FIELDS.filter((_, number) => fields[number] !== undefined);
  const changed = fields.filter((value) => value !== undefined);
  return { ...update(given), values: [...writer, id, ...changed] };
}

// Creates the row of a user before their first task.
export function beginOwner(user) {
  const text = "SELECT begin_owner($1, $2, $3, $4)";
  return { name: "begin_owner", text, values: [user.sub, user.email, user.iat, Date.now()] };
}

// One statement for each set of fields, built once.
const updates = new Map();
function update(given) {
  const name = `update_${given.join("_")}`;
  if (!updates.has(name)) updates.set(name, { name, text: changing(given) });
  return updates.get(name);
}

function changing(given) {
  const $ = (name) => `$${given.indexOf(name) + 5}`;
  const differs = given.map((name) => `tasks.${name} IS DISTINCT FROM ${$(name)}`).join(" OR ");
  const changes = given.map((name) => `${name} = ${$(name)}`);
  if (given.includes("status")) {
    changes.push(`completed_at = CASE WHEN ${$("status")} <> 'complete' THEN NULL
      WHEN tasks.status = 'complete' THEN tasks.completed_at ELSE ${NEXT} END`);
  }
  const when = (then, other) => `CASE WHEN ${differs || false} THEN ${then} ELSE ${other} END`;
  changes.push(`updated_at = ${when(NEXT, "tasks.updated_at")}`);
  changes.push(`version = ${when("writer.version", "tasks.version")}`);
  return `${WRITER}
    UPDATE tasks SET ${changes.join(", ")}
    FROM writer WHERE ${ITS_OWN} RETURNING ${WITH_VERSION}`;
}
