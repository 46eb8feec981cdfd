"use client";

import { type FormEvent, useRef, useState } from "react";
import { authClient } from "@/lib/auth-client";
import type { TaskStore } from "@/lib/store";

export type User = { id: string; name: string; email: string };

/** The user's menu: sign out, delete the account. Both leave nothing on this device. */
export function Account({ user, store, unsent }: { user: User; store: TaskStore; unsent: number }) {
  const dialog = useRef<HTMLDialogElement>(null);
  const [problem, setProblem] = useState("");

  async function signOut() {
    const loss = `${unsent} of your changes are not sent yet, and will be lost. Sign out?`;
    if (unsent > 0 && !confirm(loss)) return;
    const { error } = await authClient.signOut().catch(() => ({ error: true }));
    if (error) return setProblem("You are still signed in, because the server cannot be reached.");
    store.forget();
  }

  async function deleteAccount(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const password = String(new FormData(event.currentTarget).get("password"));
    setProblem("");
    const { error } = await authClient
      .deleteUser({ password })
      .catch(() => ({ error: { message: "The server cannot be reached. Try again later." } }));
    if (error) return setProblem(error.message ?? "Your account could not be deleted.");
    store.forget();
  }

  return (
    <>
      <button className="account" popoverTarget="account-menu" aria-label={`Account of ${user.name}`}>
        <span aria-hidden="true">{user.name.trim().charAt(0).toUpperCase()}</span>
      </button>
      <div id="account-menu" className="card menu" popover="auto">
        <p>
          <strong>{user.name}</strong>
          <br />
          <small>{user.email}</small>
        </p>
        <p className="problem" role="alert">
          {problem}
        </p>
        <button onClick={signOut}>Sign out</button>
        <button className="danger" onClick={() => dialog.current?.showModal()}>
          Delete account…
        </button>
      </div>
      <dialog ref={dialog} className="card" aria-labelledby="delete-title" onClose={() => setProblem("")}>
        <form onSubmit={deleteAccount}>
          <h2 id="delete-title">Delete your account?</h2>
          <p>Your account and all your tasks are erased at once. This cannot be undone.</p>
          <label>
            Password
            <input name="password" type="password" autoComplete="current-password" required />
          </label>
          <p className="problem" role="alert">
            {problem}
          </p>
          <div className="buttons">
            <button type="button" onClick={() => dialog.current?.close()}>
              Cancel
            </button>
            <button className="primary danger">Delete everything</button>
          </div>
        </form>
      </dialog>
    </>
  );
}
