import type { Metadata, Viewport } from "next";
import type { ReactNode } from "react";
import "./globals.css";

export const metadata: Metadata = { description: "Your tasks, on every device" };

export const viewport: Viewport = {
  themeColor: [
    { media: "(prefers-color-scheme: light)", color: "#f4f2ec" },
    { media: "(prefers-color-scheme: dark)", color: "#141614" },
  ],
};

/** The title is no part of the metadata, which Next.js removes for a moment when a page is refreshed. */
export default function Layout({ children }: { children: ReactNode }) {
  return (
    <html lang="en">
      <head>
        <title>To do</title>
      </head>
      <body>{children}</body>
    </html>
  );
}
