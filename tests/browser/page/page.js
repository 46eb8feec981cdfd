// A to-do list: Better Auth's own client signs in, fetch calls the API on another origin.
import { createAuthClient, jwtClient } from "/client.js";

// Only a test may read the API's address from the link, because the author of a link would get the
// token.
const api = new URLSearchParams(location.search).get("api");
const auth = createAuthClient({ plugins: [jwtClient()] });
const element = (id) => document.getElementById(id);

/** An error for the user: a message, and perhaps details of the answer. */
class Failure extends Error {
  constructor(message, particulars = "") {
    super(message);
    this.particulars = particulars;
  }
}

/** Run the action of an event, and show its error. */
function on(target, event, action) {
  target.addEventListener(event, async (happened) => {
    happened.preventDefault();
    await attempt(action);
  });
}

async function attempt(action) {
  try {
    await action();
    element("alert").replaceChildren();
  } catch (error) {
    const particulars = document.createElement("small");
    particulars.textContent = error.particulars ?? "";
    element("alert").replaceChildren(error.message, particulars);
  }
}

// --- Signing in ---------------------------------------------------------------------------------

const sign = element("sign");
let newcomer = false;
let token = null;

/** Return the data of an answer. Better Auth's client returns errors and never throws them. */
async function asked(answer) {
  const { data, error } = await answer;
  if (error) throw new Failure(error.message || "The sign-in service does not answer.");
  return data;
}

/** Return the JWT for the API. Fetch a new one if it expires within a minute. */
async function bearer() {
  if (!token || expiry(token) < Date.now() + 60_000) token = (await asked(auth.token())).token;
  return token;
}

function expiry(jwt) {
  const claims = jwt.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
  return JSON.parse(atob(claims)).exp * 1000;
}

function showForm() {
  const does = newcomer ? "Create account" : "Sign in";
  sign.querySelector("h2").textContent = sign.querySelector("[type=submit]").textContent = does;
  element("other").textContent = newcomer ? "I have an account" : "I am new here";
  element("name").hidden = !newcomer;
  sign.elements.name.required = newcomer;
  sign.elements.password.autocomplete = newcomer ? "new-password" : "current-password";
}

/** Show the tasks of the session, or the form without a session. */
async function enter() {
  const session = await asked(auth.getSession());
  sign.hidden = Boolean(session);
  element("tasks").hidden = element("account").hidden = !session;
  element("email").textContent = session?.user.email ?? "";
  token = null;
  list.replaceChildren();
  if (!session) return;
  list.append(...(await call("GET", "/api/tasks")).map(item));
  count();
  add.elements.title.focus();
}

on(element("other"), "click", () => {
  newcomer = !newcomer;
  showForm();
});

on(sign, "submit", async () => {
  const given = Object.fromEntries(new FormData(sign));
  await asked(newcomer ? auth.signUp.email(given) : auth.signIn.email(given));
  newcomer = false;
  sign.reset();
  showForm();
  await enter();
});

on(element("sign-out"), "click", async () => {
  await asked(auth.signOut());
  await enter();
});

// --- Tasks --------------------------------------------------------------------------------------

const add = element("add");
const list = element("list");

/** Call the API. Return the answer's JSON, or throw the message of its error. */
async function call(method, path, body) {
  const headers = { Authorization: `Bearer ${await bearer()}` };
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(api + path, { method, headers, body: JSON.stringify(body) });
  } catch {
    // The browser hides the reason: the API did not answer, or this origin may not read the answer.
    throw new Failure("The API does not answer, or it does not allow this page.");
  }
  if (response.status === 204) return null;
  const answer = await response.json();
  if (!response.ok) throw new Failure(answer.error, particulars(response));
  return answer;
}

function particulars({ status, headers }) {
  const wait = headers.get("Retry-After");
  const again = wait ? `Try again in ${wait} s. ` : "";
  return `${again}Status ${status}, request ${headers.get("X-Request-ID")}`;
}

/** Return the row of a task. */
function item(task) {
  const row = element("task").content.cloneNode(true).firstElementChild;
  const [done, title] = row.querySelectorAll("input");
  const remove = row.querySelector("button");

  function show(changed) {
    task = changed;
    done.checked = task.completed;
    done.ariaLabel = task.title;
    title.value = task.title;
    remove.ariaLabel = `Delete ${task.title}`;
    count();
  }
  async function change(method, path, body) {
    try {
      show(await call(method, path, body));
    } catch (error) {
      show(task); // the unchanged task
      throw error;
    }
  }

  on(done, "change", () =>
    change("PATCH", `/api/tasks/${task.id}/complete`, { completed: done.checked }));
  on(title, "change", () => change("PUT", `/api/tasks/${task.id}`, { title: title.value }));
  on(remove, "click", async () => {
    await call("DELETE", `/api/tasks/${task.id}`);
    row.remove();
    count();
    add.elements.title.focus();
  });
  show(task);
  return row;
}

function count() {
  const open = list.querySelectorAll("[type=checkbox]:not(:checked)").length;
  const all = list.children.length;
  element("count").textContent = all ? `${open} of ${all} to do` : "Nothing to do yet.";
}

on(add, "submit", async () => {
  list.prepend(item(await call("POST", "/api/tasks", { title: add.elements.title.value })));
  add.reset();
  count();
});

showForm();
await attempt(enter);
