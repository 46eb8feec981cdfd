// A real Better Auth on loopback, for the interoperability tests. The driver is
// tests/support/issuer.py: it passes the configuration as one JSON argument (its `Issuer.start`
// says what each entry means), reads the line `ready URL`, and closes our stdin to end us.
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import path from "node:path";
import { oauthProvider } from "@better-auth/oauth-provider";
import { betterAuth } from "better-auth";
import { APIError } from "better-auth/api";
import { getMigrations } from "better-auth/db/migration";
import { fromNodeHeaders, toNodeHandler } from "better-auth/node";
import { bearer, createJwk, jwt } from "better-auth/plugins";
import pg from "pg";

const config = JSON.parse(process.argv[2]);

// However the driver dies, its end of the pipe closes, and nothing is left running.
process.stdin.resume().on("close", () => process.exit());

// Listen first: with port 0 only a bound socket knows the port that `iss` and `aud` will name.
// On a known port somebody may already be asking; they wait.
let start;
const started = new Promise((resolve) => (start = resolve));
const server = createServer(async (request, response) => {
  try {
    await started;
    await answer(request, response);
  } catch (error) {
    console.error(error);
    response.destroy();
  }
});
server.listen(config.port, "127.0.0.1");
await once(server, "listening");
const url = `http://${config.host}:${server.address().port}`;

const pool = new pg.Pool({ connectionString: config.databaseUrl });
// The database may be dropped before we end; that is no reason to fail.
pool.on("error", () => {});

const jwtOptions = {
  jwks: { keyPairConfig: { alg: config.keyAlgorithm } },
  jwt: {
    expirationTime: config.expirationTime,
    issuer: config.issuer ?? undefined,
    audience: config.audience ?? undefined,
  },
  sessionCookieCache: config.cookieCache === "key set",
};

/** The newest e-mail verification token by address. */
const verificationTokens = new Map();

const options = {
  baseURL: `${url}${config.path}`,
  secret: config.secret,
  database: pool,
  trustedOrigins: config.trustedOrigins,
  emailAndPassword: { enabled: true },
  emailVerification: {
    sendOnSignUp: true,
    sendVerificationEmail: async ({ user, token }) => verificationTokens.set(user.email, token),
  },
  session: { cookieCache: { enabled: config.cookieCache !== null, strategy: "jwt" } },
  advanced: { database: { generateId: config.userIds ?? undefined } },
  user: { deleteUser: { enabled: true, [config.deleteHook]: deleteData } },
  plugins: [jwt(jwtOptions), bearer()],
  // Away from stdout, which the driver reads no further than the ready line.
  logger: { level: "warn", log: (level, ...message) => console.error(level, ...message) },
  rateLimit: { enabled: false },
  telemetry: { enabled: false },
};
if (config.resources) {
  options.plugins.push(
    oauthProvider({
      loginPage: "/",
      consentPage: "/",
      resources: config.resources,
      clientRegistrationDefaultResources: config.resources,
      silenceWarnings: { oauthAuthServerConfig: true, openidConfig: true },
    }),
  );
}

// Before betterAuth(), whose start already reads the tables of the provider. By program, because
// the command line tool does not run on Node 20.
await (await getMigrations(options)).runMigrations();
const auth = betterAuth(options);
const handle = toNodeHandler(auth);

/**
 * Delete what our service holds of a user who deletes their account.
 *
 * The hooks get the user and the request, no token. signJWT makes one on the server: it needs no
 * session, so unlike getToken it also works in afterDelete, when the session is gone. Throwing in
 * beforeDelete keeps the account, so that the user can try again; in afterDelete it is too late.
 */
async function deleteData(user) {
  if (!config.apiUrl) return;
  const { token } = await auth.api.signJWT({ body: { payload: { sub: user.id } } });
  const response = await fetch(`${config.apiUrl}/api/account`, {
    method: "DELETE",
    headers: { Authorization: `Bearer ${token}` },
  });
  if (!response.ok) {
    throw new APIError("BAD_GATEWAY", { message: `The service answered ${response.status}` });
  }
}

/** How the key set is answered, and how often it was asked for. */
const jwks = { mode: "ok", requests: 0 };

/** Answer the key set as the test wants it; whether that was all. */
function spoil(response) {
  jwks.requests += 1;
  if (jwks.mode === "error") response.writeHead(500).end();
  if (jwks.mode === "html") {
    response.writeHead(200, { "Content-Type": "text/html" }).end("<!doctype html><p>Sign in");
  }
  return jwks.mode !== "ok"; // "hang": no answer at all
}

/** What only a test may ask, each with one JSON object, and the cookies of a session. */
const controls = {
  // The newest key signs; nothing else needs to change. The old ones stay published.
  async "rotate-key"() {
    const key = await createJwk({ context: await auth.$context }, jwtOptions);
    return { kid: key.id };
  },
  async "withdraw-old-keys"() {
    const newest = `SELECT id FROM jwks ORDER BY "createdAt" DESC LIMIT 1`;
    const { rowCount } = await pool.query(`DELETE FROM jwks WHERE id <> (${newest})`);
    return { withdrawn: rowCount };
  },
  "verification-token": ({ email }) => ({ token: verificationTokens.get(email) }),
  "jwks-requests": () => ({ requests: jwks.requests }),
  "fail-jwks"({ mode }) {
    jwks.mode = mode;
    return {};
  },
  // A client of the OAuth provider that the user need not consent to.
  "oauth-client": (body, headers) => auth.api.adminCreateOAuthClient({ body, headers }),
  // Better Auth fills in exp, iss and aud where the payload has none.
  sign: ({ payload }) => auth.api.signJWT({ body: { payload } }),
};

const types = { ".css": "text/css", ".html": "text/html", ".js": "text/javascript" };

/** Serve the folder of test pages, and Better Auth's client beside them. */
async function serve(pathname, response) {
  const file =
    pathname === "/client.js"
      ? path.join(import.meta.dirname, "node_modules/.build/client.js")
      : config.folder && path.join(config.folder, pathname === "/" ? "index.html" : pathname);
  try {
    const content = await readFile(file);
    response.writeHead(200, { "Content-Type": types[path.extname(file)] ?? "text/plain" });
    response.end(content);
  } catch {
    response.writeHead(404).end();
  }
}

/** CORS is the host's job: Better Auth checks origins, and sends no such header. */
function allowOrigin(request, response) {
  response.setHeader("Vary", "Origin");
  if (!config.trustedOrigins.includes(request.headers.origin)) return;
  response.setHeader("Access-Control-Allow-Origin", request.headers.origin);
  response.setHeader("Access-Control-Allow-Credentials", "true");
  response.setHeader("Access-Control-Allow-Methods", "GET, POST");
  response.setHeader("Access-Control-Allow-Headers", "Authorization, Content-Type");
  response.setHeader("Access-Control-Expose-Headers", "set-auth-token, set-auth-jwt");
}

async function answer(request, response) {
  const { pathname } = new URL(request.url, url);
  const control = controls[pathname.slice("/test/".length)];
  if (pathname.startsWith("/test/") && control) {
    const body = JSON.parse((await request.toArray()).join("") || "{}");
    try {
      response.end(JSON.stringify(await control(body, fromNodeHeaders(request.headers))));
    } catch (error) {
      response.writeHead(500).end(`${error.message} ${JSON.stringify(error.body)}`);
    }
  } else if (pathname.startsWith(`${config.path || "/api/auth"}/`)) {
    allowOrigin(request, response);
    if (request.method === "OPTIONS") response.writeHead(204).end();
    else if (pathname !== "/api/auth/jwks" || !spoil(response)) await handle(request, response);
  } else {
    await serve(pathname, response);
  }
}

start();
process.stdout.write(`ready ${url}\n`);
