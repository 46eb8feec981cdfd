"use client";

export default function ErrorPage({ reset }: { reset: () => void }) {
  return (
    <main className="narrow card" role="alert">
      <h1>Something went wrong</h1>
      <p>The page could not be shown. Your tasks are safe.</p>
      <button onClick={reset}>Try again</button>
    </main>
  );
}
