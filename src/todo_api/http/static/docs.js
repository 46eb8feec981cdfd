"use strict";

// The token stays in this tab: in session storage, and never in an address.
const KEY = "todo-api token";
const field = document.getElementById("token");
const state = document.getElementById("state");
const ready = document.getElementById("ready");

function claimsOf(token) {
  try {
    const payload = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(payload), (character) => character.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes));
  } catch {
    return null;
  }
}

function describe(token) {
  if (!token) return "No token yet: the API answers 401.";
  const claims = claimsOf(token);
  if (!claims?.sub || !claims.exp) return "This is not a token of a user.";
  const end = new Date(claims.exp * 1000);
  if (end < new Date()) return `The token of ${claims.sub} has expired.`;
  return `Requests are sent as ${claims.sub}, until ${end.toLocaleString()}.`;
}

function show() {
  state.textContent = describe(field.value);
}

function use(text) {
  field.value = text.trim().replace(/^bearer\s+/i, "");
  if (field.value) sessionStorage.setItem(KEY, field.value);
  else sessionStorage.removeItem(KEY);
  show();
}

async function useReady(user) {
  const response = await fetch(`/docs/tokens/${encodeURIComponent(user)}`);
  if (response.ok) use((await response.json()).token);
  else state.textContent = "The service gives tokens only to this machine. Open this page at localhost.";
}

function button(user) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = `Sign in as ${user}`;
  made.addEventListener("click", () => useReady(user));
  return made;
}

const users = ready.dataset.users.split(" ").filter(Boolean);
ready.querySelector(".buttons").append(...users.map(button));
ready.hidden = users.length === 0;
field.addEventListener("input", show);
field.addEventListener("change", () => use(field.value));
document.getElementById("forget").addEventListener("click", () => use(""));
use(sessionStorage.getItem(KEY) ?? "");

function withToken(request) {
  const { origin, pathname } = new URL(request.url, location.href);
  if (field.value && origin === location.origin && pathname.startsWith("/api/"))
    request.headers.Authorization = `Bearer ${field.value}`;
  return request;
}

function answered(response) {
  show();
  return response;
}

// Swagger UI shows each error of an operation at full length. Here an error is one line with its
// codes, and opens on a click.
function foldedErrors(Original, { React }) {
  return function Response(properties) {
    const [isOpen, setOpen] = React.useState(false);
    const { code, response } = properties;
    if (isOpen || /^[23]/.test(code)) return React.createElement(Original, properties);
    const examples = response.getIn(["content", "application/json", "examples"]);
    const codes = examples ? examples.keySeq().join(", ") : response.get("description");
    const opener = React.createElement(
      "button",
      { type: "button", className: "folded", "aria-expanded": false, onClick: () => setOpen(true) },
      codes,
    );
    return React.createElement(
      "tr",
      { className: "response", "data-code": code },
      React.createElement("td", { className: "response-col_status" }, code),
      React.createElement("td", { className: "response-col_description" }, opener),
    );
  };
}

function foldedHeaders(Original, { React }) {
  return (properties) =>
    properties.headers?.size
      ? React.createElement(
          "details",
          { className: "folded-headers" },
          React.createElement("summary", null, "Header fields"),
          React.createElement(Original, properties),
        )
      : null;
}

// The page has its own title and its own field for the token.
const nothing = () => () => null;

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", paint);
paint();

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#operations",
  deepLinking: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  validatorUrl: null, // Swagger's own host
  requestInterceptor: withToken,
  responseInterceptor: answered,
  plugins: [
    {
      wrapComponents: {
        InfoContainer: nothing,
        ServersContainer: nothing,
        AuthorizeBtnContainer: nothing,
        authorizeOperationBtn: nothing,
        response: foldedErrors,
        headers: foldedHeaders,
      },
    },
  ],
});
