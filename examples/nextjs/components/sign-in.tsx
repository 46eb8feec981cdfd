"use client";

import { useRouter } from "next/navigation";
import { type FormEvent, useState } from "react";
import { authClient } from "@/lib/auth-client";
import { useHydrated } from "@/lib/use-hydrated";

export function SignIn() {
  const router = useRouter();
  const isHydrated = useHydrated();
  const [isNew, setIsNew] = useState(false);
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState("");

  function switchForm() {
    setIsNew(!isNew);
    setProblem("");
  }

  async function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const [name, email, password] = ["name", "email", "password"].map((each) => String(form.get(each)));
    setBusy(true);
    setProblem("");
    const { error } = await (
      isNew
        ? authClient.signUp.email({ name: name!, email: email!, password: password! })
        : authClient.signIn.email({ email: email!, password: password! })
    ).catch(() => ({ error: { message: undefined } }));
    if (!error) return router.refresh();
    setProblem(error.message ?? "The server cannot be reached. Try again later.");
    setBusy(false);
  }

  return (
    <main className="narrow">
      <h1 className="brand">To do</h1>
      <form className="card sign-in" onSubmit={submit}>
        <h2>{isNew ? "Create an account" : "Sign in"}</h2>
        {isNew && (
          <label>
            Name
            <input name="name" autoComplete="name" maxLength={100} required />
          </label>
        )}
        <label>
          E-mail
          <input name="email" type="email" autoComplete="email" required />
        </label>
        <label>
          Password
          <input
            name="password"
            type="password"
            autoComplete={isNew ? "new-password" : "current-password"}
            minLength={8}
            maxLength={128}
            aria-describedby={isNew ? "password-rule" : undefined}
            required
          />
          {isNew && <small id="password-rule">At least 8 characters</small>}
        </label>
        <p className="problem" role="alert">
          {problem}
        </p>
        <button className="primary" disabled={busy || !isHydrated}>
          {isNew ? "Create account" : "Sign in"}
        </button>
      </form>
      <p className="switch">
        {isNew ? "Already have an account?" : "New here?"}{" "}
        <button className="link" disabled={!isHydrated} onClick={switchForm}>
          {isNew ? "Sign in" : "Create an account"}
        </button>
      </p>
    </main>
  );
}
