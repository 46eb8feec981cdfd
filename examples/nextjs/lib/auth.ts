// Better Auth on the server. It shares a PostgreSQL with todo-api, and has its tables in a schema of
// its own.
import { betterAuth } from "better-auth";
import { APIError } from "better-auth/api";
import { jwt } from "better-auth/plugins";
import { PostgresDialect } from "kysely";
import { Pool } from "pg";

const pool = new Pool({ connectionString: process.env.DATABASE_URL });
// PostgreSQL may be restarted. Without this listener, an idle connection that breaks would end
// the process; with it, the next query opens a new one.
pool.on("error", (error) => console.error("PostgreSQL:", error.message));

export const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL,
  secret: process.env.BETTER_AUTH_SECRET,
  database: { dialect: new PostgresDialect({ pool }), type: "postgres", schemaName: "auth" },
  emailAndPassword: { enabled: true },
  plugins: [jwt()],
  user: { deleteUser: { enabled: true, beforeDelete: eraseTasks } },
  telemetry: { enabled: false },
  // The check would run before `instrumentation.ts` has made the tables.
  advanced: { database: { validateSchema: false } },
});

// Erases what todo-api holds of a user. If it throws, the account stays and the user can try again.
async function eraseTasks({ id }: { id: string }): Promise<void> {
  const { token } = await auth.api.signJWT({ body: { payload: { sub: id } } });
  const answer = await fetch(`${process.env.API_URL}/api/account`, {
    method: "DELETE",
    headers: { Authorization: `Bearer ${token}` },
  }).catch(() => null);
  if (!answer?.ok) {
    throw new APIError("BAD_GATEWAY", {
      message: "Your tasks could not be erased, so your account is still there. Try again later.",
    });
  }
}
