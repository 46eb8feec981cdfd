// One call of todo-api: the token, the deadline, and what an answer means.
import { authClient } from "./auth-client";

/** The service refuses the request. Sending it again does not help. */
export class Refused extends Error {}

/** Nobody answers, or the service asks to try again later. */
export class Unreachable extends Error {
  constructor(message: string, readonly seconds = 0) {
    super(message);
  }
}

/** Nobody is signed in here any more, or somebody else is. */
export class SignedOut extends Error {}

export type Answer = { status: number; ok: boolean; replayed: boolean; body: any };
export type Call = (path: string, init?: CallInit) => Promise<Answer>;
type CallInit = RequestInit & { expected?: number[]; deadline?: number };

/** Returns a function that calls the service as one user. */
export function createCall(url: string, userId: string): Call {
  const token = createToken(userId);

  return async function call(path, init = {}) {
    let answer = await send(url + path, init, await token());
    // A token can end early: the account was erased, or Better Auth has new keys.
    if (answer.status === 401) answer = await send(url + path, init, await token("new"));
    const { status, ok, body, retryAfter } = answer;
    if (ok || init.expected?.includes(status)) return answer;
    const message = body?.error ?? `The server answers with status ${status}`;
    if (status === 401 || status === 429 || status >= 500) throw new Unreachable(message, retryAfter);
    throw new Refused(message);
  };
}

async function send(url: string, init: CallInit, token: string) {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${token}`);
  if (init.body) headers.set("Content-Type", "application/json");
  const deadline = AbortSignal.timeout((init.deadline ?? 15) * 1000);
  const signal = init.signal ? AbortSignal.any([init.signal, deadline]) : deadline;
  try {
    const response = await fetch(url, { ...init, headers, signal });
    const text = await response.text();
    return {
      status: response.status,
      ok: response.ok,
      replayed: response.headers.has("Idempotency-Replayed"),
      retryAfter: Number(response.headers.get("Retry-After")),
      body: text ? JSON.parse(text) : undefined,
    };
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new Unreachable("The server cannot be reached");
  }
}

/** Returns a function that fetches a token from Better Auth, and keeps it while it is valid. */
function createToken(userId: string): (which?: "new") => Promise<string> {
  let kept = { token: "", until: 0 };

  return async function token(which) {
    if (which !== "new" && Date.now() < kept.until) return kept.token;
    const { data, error } = await authClient.token().catch(() => ({ data: null, error: null }));
    if (error?.status === 401) throw new SignedOut();
    if (!data) throw new Unreachable("The server cannot be reached");
    const { sub, iat, exp } = claims(data.token);
    // The session is a cookie, so another window can sign in as another user.
    if (sub !== userId) throw new SignedOut();
    // The lifetime and not `exp`, because this device's clock may be wrong.
    kept = { token: data.token, until: Date.now() + (exp - iat - 60) * 1000 };
    return kept.token;
  };
}

function claims(token: string): { sub: string; iat: number; exp: number } {
  const payload = token.split(".")[1]!.replaceAll("-", "+").replaceAll("_", "/");
  return JSON.parse(new TextDecoder().decode(Uint8Array.from(atob(payload), (c) => c.charCodeAt(0))));
}
